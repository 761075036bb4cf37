"""The report of `labkit bench` as a table: what was measured, or, without a GPU, what is predicted."""

import json
from pathlib import Path

from labkit.course import results

TIMED = ["op", "direction", "time", "of the floor", "bound", "peers: how many times slower", "target", "note"]
PREDICTED = ["op", "dir", "MB", "FLOP/B", "H200", "RTX 5090", "bound", "counted", "registers"]


def table_of(report: dict) -> tuple[str, list[str], list[list[str]]]:
    """Title, columns and rows."""
    header = report["header"]
    if header["timed"]:
        rates = header["ceilings"]
        title = (f"{header['device']}: copies {rates['copy_TBps']:.2f} TB/s, multiplies {rates['gemm_TFLOPs']:.0f} "
                 f"TFLOP/s (torch {header['torch']}, triton {header['triton']})")
        return title, TIMED, [_timed(row) for row in report["rows"] if row["impl"] == "ours"]
    title = "Not timed, since there is no GPU: predictions at workstation sizes in bf16, by data-sheet rates"
    return title, PREDICTED, [_predicted(row) for row in report["rows"]]


def shipped_times(op: str) -> list[tuple[str, ...]]:
    """(GPU, direction, floor, median, share of the floor) of `op` in each GPU run that is shipped; none is no error."""
    rows = []
    for file in sorted((results.RESULTS / "workstation").glob("*/bench.json")):
        report = json.loads(file.read_text(encoding="utf-8"))
        rows += [(report["header"]["device"], row["direction"], milliseconds(row["floor_ms"]),
                  milliseconds(row["time_ms"]["p50"]), f"{row['fraction_of_floor']:.2f}")
                 for row in report["rows"] if row["op"] == op and row["impl"] == "ours" and not row["error"]]
    return rows


def remarks(report: dict, file: Path | None = None) -> list[str]:
    """What belongs under the table: peers that did not take part, what was left out, this CPU's ceilings, the file."""
    header = report["header"]
    said = list(dict.fromkeys(f"{each['op']}: {each['impl']} skipped: {each['reason']}" for each in report["skipped"]))
    if not header["timed"]:
        rates = header["cpu_ceilings"]
        said += [f"{row['op']}, {row['direction']}: {row['note']}." for row in report["rows"] if row["note"]]
        said += header["left_out"]
        if any(any(row["compiled"].values()) for row in report["rows"]):
            said.append(spills_of(report))
        said.append("H200, RTX 5090: floor time; bound: on an H200. counted: bytes in the interpreter over the "
                    "formula. registers: sm_90/sm_120. Occupancy and targets: --json.")
        said.append(f"This CPU copies {rates['copy']['median'] / 1e9:.1f} GB/s and multiplies "
                    f"{rates['matmul']['median'] / 1e9:.1f} GFLOP/s ({rates['dtype']}, {rates['threads']} threads).")
    return [*said, f"Written: {file}"] if file else said


def _timed(row: dict) -> list[str]:
    if row["error"]:
        return [row["op"], "", "failed", "", "", "", "", row["error"]]
    peers = [f"{name} {ratio_text(each, row['noise'])}" for name, each in row["ratio_vs"].items() if name != "ours"]
    targets = [f"{'met' if each['met'] else 'missed'}: {each['target']} (is {each['reached']:.3g})"
               for each in row["targets"]]
    return [row["op"], row["direction"], milliseconds(row["time_ms"]["p50"]), f"{row['fraction_of_floor']:.2f}",
            row["bound"], "\n".join(peers), "\n".join(targets), row["note"] or ""]


def ratio_text(ratio: dict, noise: float) -> str:
    """Like "1.42 (1.40 to 1.44)"; "even" where it is within the noise or its interval holds 1."""
    within_noise = 1 / (1 + noise) <= ratio["p50"] <= 1 + noise
    if within_noise or ratio["lo"] <= 1 <= ratio["hi"]:
        return "even"
    return f"{ratio['p50']:.2f} ({ratio['lo']:.2f} to {ratio['hi']:.2f})"


def _predicted(row: dict) -> list[str]:
    floors = [milliseconds(each["floor_ms"]) for each in row["predicted"].values()]
    bound = next(iter(row["predicted"].values()))["bound"]
    intensity = f"{row['intensity']:,.0f}" if row["intensity"] >= 10 else f"{row['intensity']:.2g}"
    counted = f"{row['counted']['ratio']:.3f}" if row["counted"] else "-"
    return [row["op"], row["direction"], f"{row['bytes_floor'] / 1e6:.0f}", intensity, *floors, bound,
            counted, _registers(row)]


def _registers(row: dict) -> str:
    """The most of any kernel, like "34/39" for sm_90 and sm_120; "-" where nothing was compiled."""
    compiled = [kernels for kernels in row["compiled"].values() if kernels]
    return "/".join(str(max(each["registers"] for each in kernels)) for kernels in compiled) or "-"


def spills_of(report: dict) -> str:
    """One sentence on the registers that were spilled, in all kernels that were compiled."""
    found = {f"{row['op']} {row['direction']} on {arch}" for row in report["rows"]
             for arch, kernels in row["compiled"].items() for each in kernels if each["spill_bytes"]}
    return f"Spilled registers: {', '.join(sorted(found))}." if found else "No compiled kernel spills registers."


def milliseconds(value: float) -> str:
    """Microseconds below one millisecond."""
    return f"{value:.3g} ms" if value >= 1 else f"{1000 * value:.3g} us"
