"""The report of `labkit bench` as a table: what was measured, or, without a GPU, what is predicted."""

import json
from pathlib import Path

from labkit.course import results

TIMED = ["op", "direction", "time", "of the floor", "bound", "peers: how many times slower", "target", "note"]
PREDICTED = ["op", "direction", "MB", "FLOP/byte", "floor and bound: H200", "RTX 5090", "counted / formula",
             "registers, spills, occupancy", "target"]


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
    floors = [f"{milliseconds(each['floor_ms'])} {each['bound']}" for each in row["predicted"].values()]
    counted = f"{row['counted']['ratio']:.3f}" if row["counted"] else "-"
    return [row["op"], row["direction"], f"{row['bytes_floor'] / 1e6:.1f}", f"{row['intensity']:.2g}", *floors, counted,
            "\n".join(_resources(row)) or "-", "\n".join(row["targets"])]


def _resources(row: dict) -> list[str]:
    """One line an arch, like "sm_90: 66, 0, 38%": the most registers, all spilled bytes, the lowest occupancy."""
    return [f"{arch}: {max(each['registers'] for each in kernels)}, {sum(each['spill_bytes'] for each in kernels)}, "
            f"{min(each['occupancy'] for each in kernels):.0%}" for arch, kernels in row["compiled"].items() if kernels]


def milliseconds(value: float) -> str:
    """Microseconds below one millisecond."""
    return f"{value:.3g} ms" if value >= 1 else f"{1000 * value:.3g} us"
