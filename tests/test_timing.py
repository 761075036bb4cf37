"""Timing on a fake clock: rounds are interleaved, ratios survive drift, their intervals hold the truth."""

import itertools

import numpy as np
import pytest
import torch

from labkit.measure import timing
from labkit.measure.timing import Timing, Window, compare, input_sets, noise_floor, ratio


class FakeClock:
    """Calls return their own seconds, and that is how long they last; the clock rate of the machine drifts."""

    def __init__(self, drift: float = 0.0, noise: float = 0.0, seed: int = 0):
        self.time, self.drift, self.noise, self.random = 0.0, drift, noise, np.random.default_rng(seed)

    def now(self) -> float:
        return self.time

    def window(self, calls) -> Window:
        turn = itertools.cycle(calls)

        def once() -> float:
            seconds = next(turn)() * (1 + self.drift * self.time) * float(np.exp(self.noise * self.random.normal()))
            self.time += seconds
            return seconds

        return Window(once, "fake")


def test_rounds_are_interleaved_in_an_order_that_changes():
    """Each round times every implementation once; the order is shuffled, and the same for the same seed."""
    def order(seed: int) -> list[str]:
        said: list[str] = []
        calls = {name: [lambda name=name: said.append(name) or 1.0] for name in "abc"}
        compare(calls, FakeClock(), seconds=60.0, seed=seed)
        return said

    said = order(3)
    rounds = [tuple(said[i:i + 3]) for i in range(0, len(said), 3)]
    assert len(rounds) >= timing.LEAST_ROUNDS and all(sorted(each) == ["a", "b", "c"] for each in rounds)
    assert len(set(rounds)) > 3 and order(3) == said != order(4)


def test_a_drifting_clock_leaves_ratios_alone():
    """The machine slows down to a third within the run: the times spread, the ratio of each round does not."""
    times = compare({"ours": [lambda: 1.0], "peer": [lambda: 1.5]}, FakeClock(drift=0.02), seconds=50)
    assert max(times["ours"].rounds) > 2 * min(times["ours"].rounds)
    assert ratio(times["ours"], times["peer"])["p50"] == pytest.approx(1.5, rel=0.03)


def test_the_interval_of_a_ratio_covers_the_truth():
    """Of 100 comparisons with noise of 5% in 40 rounds, the interval holds the truth in 88 at least, and is narrow."""
    held, widths = 0, []
    for seed in range(100):
        times = compare({"ours": [lambda: 1.0], "peer": [lambda: 1.3]}, FakeClock(noise=0.05, seed=seed), seconds=92)
        found = ratio(times["ours"], times["peer"], seed)
        held += found["lo"] <= 1.3 <= found["hi"]
        widths.append(found["hi"] - found["lo"])
    assert held >= 88 and np.median(widths) < 0.08


def test_an_implementation_against_itself_is_the_noise_floor():
    """Its interval holds 1, and the floor is the end that is farther away; without noise it is 0."""
    times = compare({"ours": [lambda: 1.0], "again": [lambda: 1.0]}, FakeClock(noise=0.05), seconds=1)
    found = ratio(times["ours"], times["again"])
    assert found["lo"] <= 1 <= found["hi"] and 0 < noise_floor(found) < 0.1
    assert noise_floor({"lo": 0.9, "hi": 1.01}) == pytest.approx(-np.log(0.9))
    assert noise_floor({"lo": 1.0, "hi": 1.0}) == 0


def test_slow_rounds_end_early_but_never_below_five():
    """Twenty rounds, unless they take three times the budget."""
    calls = {"slow": [lambda: 10.0]}
    assert len(compare(calls, FakeClock(), seconds=1)["slow"].rounds) == timing.FEWEST_ROUNDS
    assert len(compare(calls, FakeClock(), seconds=100)["slow"].rounds) == timing.LEAST_ROUNDS


def test_quantiles_are_in_milliseconds():
    """Of rounds of 1 to 5 seconds, whatever their order."""
    found = Timing((3.0, 1.0, 5.0, 2.0, 4.0), "fake").quantiles()
    assert (found["p50"], found["n"]) == (3000.0, 5) and found["p20"] == pytest.approx(1800)


def test_inputs_are_copied_until_a_round_passes_the_cache(monkeypatch):
    """3 x L2 in all, 16 sets at most, one where it is larger by itself; copies own their memory and need gradients."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: type("Gpu", (), {"L2_cache_size": 1000}))
    sets = input_sets({"x": torch.zeros(100, requires_grad=True)}, torch.device("cuda"))
    assert len(sets) == 8 and len({each["x"].data_ptr() for each in sets}) == 8
    assert all(each["x"].requires_grad and each["x"].is_leaf for each in sets)
    assert len(input_sets({"x": torch.zeros(1)}, torch.device("cuda"))) == 16
    assert len(input_sets({"x": torch.zeros(1000)}, torch.device("cuda"))) == 1


def test_an_implementation_that_breaks_down_is_left_out():
    """Its error is handed back, and the others are timed; without a place for errors it is raised."""
    def breaks() -> float:
        raise RuntimeError("out of memory")

    class Warming(FakeClock):
        def window(self, calls) -> Window:
            calls[0]()
            return super().window(calls)

    failed: dict[str, Exception] = {}
    calls = {"ours": [lambda: 1.0], "peer": [breaks]}
    assert set(compare(calls, Warming(), seconds=1, failed=failed)) == {"ours"}
    assert str(failed["peer"]) == "out of memory"
    with pytest.raises(RuntimeError, match="out of memory"):
        compare(calls, Warming(), seconds=1)
