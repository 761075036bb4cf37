"""The measured ceilings count the right work, use a buffer beyond the cache, and keep to their time."""

import time

import pytest
import torch

from labkit.measure import ceilings
from labkit.measure.ceilings import MIB, Rate

CPU = torch.device("cpu")


class Clock:
    """A clock whose every reading is `step` later: a call then lasts exactly `step`, whatever the machine does."""

    def __init__(self, step: float):
        self.now, self.step = 0.0, step

    def perf_counter(self) -> float:
        self.now += self.step
        return self.now


def test_a_copy_counts_bytes_read_and_written(monkeypatch):
    """On a clock that charges 0.5 s a call, copying 4 MiB is 8 MiB of traffic: 16 MiB/s. One side only would give 8."""
    monkeypatch.setattr(ceilings, "time", Clock(0.5))
    assert ceilings.copy_rate(CPU, seconds=4, buffer_bytes=4 * MIB).median == 2 * 4 * MIB / 0.5


def test_a_matmul_counts_two_flops_a_multiply_add(monkeypatch):
    """32^3 multiply-adds in 0.25 s, two FLOPs each."""
    monkeypatch.setattr(ceilings, "time", Clock(0.25))
    assert ceilings.matmul_rate(32, CPU, torch.float32, seconds=2).median == 2 * 32**3 / 0.25


def test_the_matrices_are_random_unless_zeros_are_asked_for(monkeypatch):
    """Zeros draw less power on a GPU and flatter it, so the default must not be zeros."""
    seen = []
    real = torch.mm

    def spy(a, b, out):
        seen.append((a.std().item(), b.std().item()))
        return real(a, b, out=out)

    monkeypatch.setattr(torch, "mm", spy)
    ceilings.matmul_rate(64, CPU, torch.float32, seconds=0)
    assert min(seen[-1]) > 0.9
    ceilings.matmul_rate(64, CPU, torch.float32, seconds=0, zeros=True)
    assert max(seen[-1]) == 0


def test_the_copy_buffer_is_larger_than_the_last_level_cache(tmp_path, monkeypatch):
    """Otherwise the cache's bandwidth is measured: four times the largest cache, also a large one, within 2 GiB."""
    for index, size in enumerate(("48K", "2048K", "96M")):
        (tmp_path / f"index{index}").mkdir()
        (tmp_path / f"index{index}" / "size").write_text(size + "\n")
    assert ceilings.last_level_cache_bytes(tmp_path) == 96 * MIB
    assert ceilings.last_level_cache_bytes(tmp_path / "absent") == 32 * MIB
    monkeypatch.setattr(ceilings, "last_level_cache_bytes", lambda: 96 * MIB)
    assert ceilings.copy_buffer_bytes(CPU) == 384 * MIB


def test_the_summary_is_the_quantiles_of_the_repeats(monkeypatch):
    """Five repeats of 1 to 5 seconds, out of order: the middle one is the median; p20 and p80 are rates, not times."""
    times = iter([9.0, 9.0, 3.0, 1.0, 5.0, 2.0, 4.0])  # the first two are warm-up and calibration
    monkeypatch.setattr(ceilings, "_cpu_seconds", lambda call, calls: next(times))
    rate = ceilings.rate(lambda: None, 60.0, CPU, seconds=0, size=7)
    assert (rate.median, rate.repeats, rate.size) == (20.0, 5, 7)
    assert rate.p20 == pytest.approx(14.4) and rate.p80 == pytest.approx(36.0)


def test_the_matmul_ceiling_is_the_best_size(monkeypatch):
    """A ceiling that another size exceeds is none: the middle size is made the fastest here, and must be the answer."""
    speed = dict(zip(ceilings.MATMUL_SIZES["cpu"], (2.0, 7.0, 3.0), strict=True))
    monkeypatch.setattr(ceilings, "copy_rate", lambda *_: Rate(1.0, 1.0, 1.0, 5, 1))
    monkeypatch.setattr(ceilings, "matmul_rate", lambda n, *_: Rate(speed[n], 0, 0, 5, n))
    found = ceilings.measure_ceilings("cpu")
    assert (found.matmul.median, found.matmul.size, found.ridge) == (7.0, ceilings.MATMUL_SIZES["cpu"][1], 7.0)


def test_both_ceilings_of_this_machine_in_three_seconds():
    """Real, loosely bounded: any machine copies over 0.1 GB/s, multiplies over 0.1 GFLOP/s, and is done in time."""
    start = time.perf_counter()
    found = ceilings.measure_ceilings("cpu", seconds=0.4)
    assert time.perf_counter() - start < 3
    assert found.device == "CPU" and found.dtype == "float32" and found.threads == torch.get_num_threads()
    for rate in (found.copy, found.matmul):
        assert isinstance(rate, Rate) and 0 < rate.p20 <= rate.median <= rate.p80
        assert 1e8 < rate.median < 1e14
    assert found.ridge == found.matmul.median / found.copy.median
