"""What can be said about every kernel without a GPU: a prediction that a run on one then checks.

    predict_bench(["rms_norm"])  ->  {header, rows}       label "not timed" in the header and in each row

floor and bound   bytes over the data sheet's bandwidth or FLOPs over its rate, for an H200 and an RTX 5090; a machine
                  reaches 80 to 90% of either, so a run on it measures its own ceilings
compiled          registers, spills, shared memory, 16-byte loads and occupancy, from the readings that are shipped
counted           bytes requested in the interpreter, on small tensors, over the formula's
"""

import platform
from collections.abc import Iterable
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

import torch

from labkit import __version__
from labkit.errors import LabError
from labkit.kernels.machine_code import Reading, shipped_readings
from labkit.kernels.occupancy import occupancy
from labkit.measure.bench import check_ops
from labkit.measure.benchmarks import BACKWARD, BENCHMARKS, BOTH, FORWARD, Benchmark
from labkit.measure.ceilings import Ceilings, measure_ceilings
from labkit.measure.contest import LAUNCH_BOUND_MS
from labkit.measure.counted_bytes import counted_ratios
from labkit.measure.hardware import CARDS, Card
from labkit.measure.peers import version

LABEL = "not timed"
SHOWN = ("H200 SXM", "RTX 5090")
WORDS = {FORWARD: ("forward",), BACKWARD: ("backward",), BOTH: ("forward", "backward")}
KERNEL = ("kernel", "registers", "spill_bytes", "shared_bytes", "loads", "wide_loads", "settings")


def predict_bench(ops: list[str], *, quick: bool = False, commit: str = "unknown") -> dict[str, Any]:
    """The report without times. `quick` leaves out counting bytes, which takes ten seconds or more."""
    chosen = check_ops(ops)
    reasons: list[str] = []
    readings = _or_reason(shipped_readings, reasons, {})
    if quick:
        reasons.append("A quick run does not count bytes.")
    elif not version("triton"):
        reasons.append("Triton is not installed, so no bytes were counted.")
    countable = not quick and version("triton")
    counted = _or_reason(lambda: counted_ratios(chosen), reasons, {}) if countable else {}
    rows = [row(BENCHMARKS[op], direction, readings, counted.get(op, {}))
            for op in chosen for direction in directions(BENCHMARKS[op])]
    return {"header": header(measure_ceilings("cpu"), commit, reasons), "rows": rows, "skipped": []}


def directions(benchmark: Benchmark) -> tuple[str, ...]:
    """Those that have a formula."""
    return tuple(direction for direction in (FORWARD, BACKWARD, BOTH) if direction in benchmark.costs)


def row(benchmark: Benchmark, direction: str, readings: dict, counted: dict[str, dict]) -> dict[str, Any]:
    """One direction of one op."""
    cost, cards = benchmark.cost(direction, benchmark.sizes, 2), [CARDS[name] for name in SHOWN]
    cases = cases_of(benchmark, direction, readings)
    compiled = {arch_of(card): [resources(each) for name in cases for each in readings[name].get(arch_of(card), [])]
                for card in cards}
    judged = {direction} | ({BOTH} if direction == BACKWARD else set())
    return {"op": benchmark.op, "impl": "ours", "direction": direction, "label": LABEL, "shape": benchmark.sizes,
            "dtype": "bfloat16", "bytes_floor": cost.memory_bytes, "flops": cost.flops,
            "intensity": cost.flops / cost.memory_bytes,
            "predicted": {card.name: prediction(cost, card) for card in cards}, "compiled": compiled,
            "compiled_cases": cases, "counted": counted.get(direction),
            "targets": [target.text() + f" ({target.direction})" * (target.direction != direction)
                        for target in benchmark.targets if target.direction in judged],
            "note": "; ".join(filter(None, [benchmark.uncounted, benchmark.count_notes.get(direction)]))}


def prediction(cost: Any, card: Card) -> dict[str, Any]:
    """The floor in milliseconds by the card's data sheet, and what bounds it."""
    floor = 1e3 * cost.floor_seconds(card.bandwidth, card.peak)
    bound = "launch" if floor < LAUNCH_BOUND_MS else cost.bound(card.bandwidth, card.peak)
    return {"floor_ms": floor, "bound": bound, "arch": arch_of(card)}


def arch_of(card: Card) -> str:
    """Like "sm_90"."""
    return f"sm_{round(10 * card.capability.value)}"


def cases_of(benchmark: Benchmark, direction: str, names: Iterable[str]) -> list[str]:
    """Those of the benchmark's compile cases that belong to a direction and are among `names`."""
    return [case for case in benchmark.cases if case in names and case.rpartition(" ")[2] in WORDS[direction]]


def resources(reading: Reading) -> dict[str, Any]:
    """What decides how many warps fit, and how wide the loads are."""
    kept = asdict(reading)
    return {name: kept[name] for name in KERNEL} | {"occupancy": occupancy(reading)}


def header(ceilings: Ceilings, commit: str, reasons: list[str]) -> dict[str, Any]:
    """What the numbers depend on; the ceilings are this CPU's, which no kernel's floor uses."""
    return {"timed": False, "label": LABEL, "device": ceilings.device, "cpu_ceilings": asdict(ceilings),
            "cards": {name: {"copy_TBps": CARDS[name].bandwidth / 1e12, "gemm_TFLOPs": CARDS[name].peak / 1e12,
                             "source": "data sheet"} for name in SHOWN},
            "torch": torch.__version__, "triton": version("triton"), "python": platform.python_version(),
            "labkit": __version__, "commit": commit, "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
            "left_out": reasons}


def _or_reason(ask: Any, reasons: list[str], default: Any) -> Any:
    try:
        return ask()
    except LabError as error:
        reasons.append(error.problem)
        return default
