"""Gate (b): the machine code of every kernel, for Hopper and the RTX 50 series, with no GPU."""

import functools

import pytest
from compile_cases import ARCHES, CASES, kept

from labkit.errors import LabError
from labkit.kernels.language import TRITON
from labkit.kernels.machine_code import Reading, readings_of, shipped_readings
from labkit.kernels.occupancy import limits

pytestmark = [pytest.mark.compile, pytest.mark.skipif(not TRITON, reason="Triton is not installed")]
each = pytest.mark.parametrize(("name", "arch"), [(name, arch) for name in CASES for arch in ARCHES])
KEEP = "python -m tests.kernels.compile_cases"


@functools.cache
def compiled(name: str, arch: int) -> list[Reading]:
    return readings_of(CASES[name].launch, arch)


@each
def test_absolute_gates(name: str, arch: int):
    """No spill, no float64, shared memory within the limit, at most ten seconds of processor time a kernel."""
    readings = compiled(name, arch)
    assert readings, f"{name} launched no kernel"
    for reading in readings:
        assert reading.spill_bytes == 0, reading
        assert reading.fp64_lines == 0, reading
        assert reading.shared_bytes <= limits(arch).shared_block, reading
        assert reading.seconds <= 10, reading


@each
def test_the_instructions_that_a_kernel_is_fast_by(name: str, arch: int):
    """16-byte loads where memory is the bound, tensor cores where there is a product."""
    case = CASES[name]
    for reading in compiled(name, arch):
        if reading.kernel in case.apart:
            continue
        assert reading.wide_loads or not case.memory_bound, reading
        assert (reading.wgmma if arch == 90 else reading.mma) or not case.has_dot, reading


@each
def test_readings_are_those_that_are_kept(name: str, arch: int):
    """Against data/results/compile: registers within 10%, spills equal, the same kernels."""
    try:
        shipped = shipped_readings()
    except LabError as error:
        pytest.skip(error.problem)
    assert name in shipped, f"no readings are kept for {name!r}; write them: {KEEP}"
    before, now = shipped[name][f"sm_{arch}"], compiled(name, arch)
    complaint = changes(before, now)
    assert not complaint, f"{complaint}; if that is meant: {KEEP}"


def changes(before: list[Reading], now: list[Reading]) -> str:
    """What differs too much, with both numbers; empty where nothing does."""
    if [reading.kernel for reading in before] != [reading.kernel for reading in now]:
        return f"kernels were {[r.kernel for r in before]}, are {[r.kernel for r in now]}"
    for old, new in zip(before, now, strict=True):
        if abs(new.registers - old.registers) > 0.1 * old.registers:
            return f"{new.kernel} {new.arch}: registers were {old.registers}, are {new.registers}"
        if new.spill_bytes != old.spill_bytes:
            return f"{new.kernel} {new.arch}: spilled bytes were {old.spill_bytes}, are {new.spill_bytes}"
    return ""


@pytest.mark.parametrize(("change", "both"), [({"registers": 45}, ("40", "45")), ({"registers": 35}, ("40", "35")),
                                              ({"spill_bytes": 8}, ("0", "8")), ({"kernel": "b"}, ("a", "b"))])
def test_a_change_is_noticed_with_both_numbers(change: dict, both: tuple[str, str]):
    """More than 10% more or fewer registers, any spill, another kernel; 10% exactly passes."""
    old = Reading("a", "sm_90", 40, 0, 0, 0, 1, 1, 0, 0, 0, 0, {})
    complaint = changes([old], [Reading(**old.as_dict() | change)])
    assert all(number in complaint for number in both)
    assert not changes([old], [Reading(**old.as_dict() | {"registers": 44})])


def test_no_readings_are_kept_of_cases_that_are_gone():
    """A case that was renamed or dropped leaves nothing behind, and the file holds no seconds."""
    try:
        shipped = shipped_readings()
    except LabError as error:
        pytest.skip(error.problem)
    assert set(shipped) <= set(CASES), f"write them anew: {KEEP}"
    assert all("seconds" not in reading for reading in kept(compiled(next(iter(CASES)), 90)))
