"""`labkit bench`: the catalogue is whole, planted peers are judged, a failure stops nothing, no GPU is needed."""

import dataclasses
import importlib
import itertools
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from labkit import kernels
from labkit.course import bench_table, roofline
from labkit.errors import LabError
from labkit.measure import bench, benchmarks, contest, launches, not_timed, peers
from labkit.measure.benchmarks import BACKWARD, BENCHMARKS, BOTH, FORWARD
from labkit.measure.ceilings import Ceilings, Rate
from labkit.measure.correctness import largest_error
from labkit.measure.targets import Target, note

CPU = torch.device("cpu")


# ---- catalogue


def test_every_public_kernel_has_a_benchmark():
    """By name, with inputs that its call takes, gradients where it has some, and a reference that agrees with it."""
    assert set(BENCHMARKS) == set(kernels.__all__)
    for op, benchmark in BENCHMARKS.items():
        inputs = benchmark.make_inputs(CPU, torch.float32, benchmark.small)
        some = dataclasses.replace(benchmark, check_rows=benchmark.check_rows and 1)
        assert largest_error(some, inputs, torch.float64) < 1e-5, op
        assert set(benchmark.wrt) <= set(inputs) and benchmark.directions and benchmark.targets
        assert {target.direction for target in benchmark.targets} <= set(benchmark.directions)
        assert {target.peer for target in benchmark.targets} <= {"", *peers.peers_of(op)}


def test_the_check_sees_a_wrong_result_and_a_wrong_gradient():
    """A kernel that is off by a percent, in its result or only in its gradient, is found."""
    good = BENCHMARKS["rms_norm"]
    inputs = good.make_inputs(CPU, torch.float32, good.small)

    def off(part: str):
        def call(impl, x, weight_D):
            y = kernels.rms_norm(x, weight_D)
            if impl == "reference":
                return y
            return y * 1.01 if part == "result" else y * 1.01 - 0.01 * y.detach()

        return dataclasses.replace(good, call=call, check_rows=4)

    assert largest_error(good, inputs) < 1e-6
    assert min(largest_error(off(part), inputs) for part in ("result", "gradient")) > 5e-3


def test_every_kernel_finds_its_compiled_cases():
    """Each case that is named exists in the compile gate, and each direction has one."""
    sys.path.insert(0, str(Path(__file__).parent / "kernels"))
    try:
        names = set(importlib.import_module("compile_cases").CASES)
    finally:
        sys.path.pop(0)
    for op, benchmark in BENCHMARKS.items():
        assert set(benchmark.cases) <= names, op
        assert all(not_timed.cases_of(benchmark, each, names) for each in not_timed.directions(benchmark)), op


def test_inputs_look_like_training():
    """Zipf's law: the commonest id stands in 5% of the places or more; log-ratios have tails; some rows are sharp."""
    generator = torch.Generator().manual_seed(0)
    ids = benchmarks.draw.zipf_ids(generator, 5000, 4000)
    assert 0.02 < (ids == 0).float().mean() < 0.2 and ids.unique().numel() > 500 and ids.max() < 5000
    tails = benchmarks.draw.log_ratios(generator, 20_000)
    assert ((tails - tails.mean()) / tails.std()).pow(4).mean() > 5  # a normal distribution has 3
    logits_NV, target_N = benchmarks.draw.training_logits(generator, 40, 3000, torch.float32)
    certain = logits_NV.softmax(1).gather(1, target_N[:, None]).squeeze(1)
    assert certain[::10].min() > 0.5 > certain[1::10].median()


# ---- a run, on the CPU, where only its logic is meant


@pytest.fixture
def run(monkeypatch):
    """run_bench on small inputs, in a second or so, with ceilings that are given."""
    copy, matmul = (Rate(median, median, median, 5, 1) for median in (1e10, 1e11))
    monkeypatch.setattr(bench, "measure_ceilings", lambda *_: Ceilings("CPU", "float32", 1, copy, matmul))
    return lambda *ops: bench.run_bench(list(ops), CPU, seconds=0.02, quick=True, size="small")


HEADER = {"timed", "complete", "device", "arch", "sm_count", "l2_bytes", "memory_bytes", "driver", "clocks", "torch",
          "triton", "cuda", "python", "labkit", "commit", "date", "ceilings", "seed"}
KEYS = {"op", "impl", "direction", "shape", "dtype", "arch", "time_ms", "ratio_vs", "bytes_floor", "flops", "floor_ms",
        "fraction_of_floor", "bound", "peak_bytes", "launches", "host_us", "max_err", "config", "regs", "spills",
        "smem"}


def test_a_report_has_every_key(run):
    """Header and rows, for ours and peers, and all of it is JSON."""
    report = json.loads(json.dumps(run("rms_norm")))
    assert set(report["header"]) >= HEADER and report["header"]["complete"] and not report["header"]["timed"]
    assert {(row["impl"], row["direction"]) for row in report["rows"]} >= {
        ("ours", FORWARD), ("ours", BOTH), ("F.rms_norm", FORWARD), ("F.rms_norm", BOTH)}
    for row in report["rows"]:
        assert set(row) >= KEYS and set(row) == set(contest.ROW)
        assert row["time_ms"].keys() == {"p20", "p50", "p80", "n"} and row["bytes_floor"] > 0
        assert row["fraction_of_floor"] == pytest.approx(row["floor_ms"] / row["time_ms"]["p50"])
    ours = next(row for row in report["rows"] if row["impl"] == "ours")
    assert set(ours["ratio_vs"]) == {"ours", "F.rms_norm"} and ours["targets"] and ours["max_err"] < 1e-5
    assert any(each["impl"] == "torch.compile" and "quick" in each["reason"] for each in report["skipped"])


def test_planted_peers_are_judged(run, monkeypatch):
    """One that is much slower, one that is much faster, one that breaks, and one that writes over its inputs."""
    given = []

    def eats(x, weight_D):
        return weight_D * x.zero_().sum()

    def slow(x, weight_D):
        given.append(float(x.abs().sum()))
        for _ in range(60):
            y = kernels.rms_norm(x, weight_D)
        return y

    def broken():
        raise ImportError("no such package")

    planted = {"slow": peers.Peer(lambda: slow), "fast": peers.Peer(lambda: lambda x, weight_D: x),
               "broken": peers.Peer(broken), "eats": peers.Peer(lambda: eats, overwrites=("x",))}
    monkeypatch.setattr(contest, "peers_of", lambda op: dict(planted))
    monkeypatch.setitem(BENCHMARKS, "rms_norm", dataclasses.replace(BENCHMARKS["rms_norm"], costs={
        FORWARD: BENCHMARKS["rms_norm"].costs[FORWARD]}))
    report = run("rms_norm")
    ours = next(row for row in report["rows"] if row["impl"] == "ours")
    assert ours["ratio_vs"]["slow"]["lo"] > 5 and ours["ratio_vs"]["fast"]["hi"] < 1
    assert "slower than fast by" in ours["note"] and "slower than slow" not in ours["note"]
    assert [(each["impl"], each["reason"]) for each in report["skipped"]] == [
        ("broken", "ImportError: no such package")]
    differs = next(row for row in report["rows"] if row["impl"] == "fast")
    assert "differs from ours" in differs["note"]
    assert len(given) > 5 and len(set(given)) == 1 and given[0] > 0  # what one peer writes over is its own


def test_one_failure_is_recorded_and_the_rest_goes_on(run, monkeypatch):
    """A kernel that raises, and one that is wrong, are rows with an error; the others are measured."""
    def raises(impl, **_):
        raise RuntimeError("CUDA out of memory")

    def wrong(impl, logits_NV, target):
        return kernels.cross_entropy(logits_NV, target)[0] * (1 if impl == "reference" else 1.5)

    monkeypatch.setitem(BENCHMARKS, "rms_norm", dataclasses.replace(BENCHMARKS["rms_norm"], call=raises))
    monkeypatch.setitem(BENCHMARKS, "cross_entropy", dataclasses.replace(BENCHMARKS["cross_entropy"], call=wrong))
    report = run("rms_norm", "cross_entropy", "topk_kl_gradient")
    assert bench.failures(report) == ["rms_norm", "cross_entropy"]
    first, second = (row for row in report["rows"] if row["error"])
    assert first["error"] == "RuntimeError: CUDA out of memory" and "wrong at the timed size" in second["error"]
    assert second["time_ms"] is None and set(second) == set(contest.ROW)
    assert any(row["op"] == "topk_kl_gradient" and row["time_ms"] for row in report["rows"])


def test_a_report_is_saved_after_every_op(run, monkeypatch):
    """A run that is stopped leaves what it has, marked as not complete."""
    saved = []
    bench.run_bench(["topk_kl_gradient", "rms_norm"], CPU, seconds=0.02, quick=True, size="small",
                    save=lambda report: saved.append((len(report["rows"]), report["header"]["complete"])))
    assert [complete for _, complete in saved] == [False, True] and 0 < saved[0][0] < saved[1][0]


def test_targets_are_judged_and_misses_explained():
    """Each kind of target, met and missed; the reason comes from what was measured beside the time."""
    row = {"arch": "sm_90", "fraction_of_floor": 0.5, "time_ms": {"p50": 0.02}, "peak_bytes": 20, "bound": "memory",
           "ratio_vs": {"peer": {"p50": 0.8, "lo": 0.7, "hi": 0.9}}, "host_us": 5.0, "spills": 0, "launches": 3,
           "method": "events", "device_ms": 0.004}
    others = {"peer": {"peak_bytes": 100}}
    for target, met in ((Target("floor", 0.4, FORWARD), True), (Target("floor", 0.85, FORWARD), False),
                        (Target("ratio", 0.75, FORWARD, "peer"), True), (Target("ratio", 5, FORWARD, "peer"), False),
                        (Target("memory", 0.2, FORWARD, "peer"), True), (Target("memory", 0.1, FORWARD, "peer"), False),
                        (Target("milliseconds", 0.02, FORWARD), True),
                        (Target("milliseconds", 0.01, FORWARD), False)):
        assert target.judged(row, others)["met"] is met, target
    assert Target("milliseconds", 0.01, FORWARD).judged(row | {"method": "as called"}, others)["reached"] == 0.004
    assert Target("floor", 0.4, FORWARD, arch="sm_120").judged(row, others) is None
    assert Target("ratio", 2, FORWARD, "absent").judged(row, others) is None
    missed = [Target("floor", 0.85, FORWARD).judged(row, others)]
    assert note(row, missed, 0.01) == ("misses: at least 0.85 of the floor (no reason found yet); "
                                       "slower than peer by 1.25")
    assert note(row, [], 0.5) == "" == note(row, [], 0.01, ("peer",))  # within the noise; a yardstick
    assert "launch-bound: 3 launches" in note(row | {"bound": "launch"}, missed, 1)
    assert "registers spill" in note(row | {"spills": 8}, missed, 1)
    assert "host needs 30 us" in note(row | {"host_us": 30.0}, missed, 1)


def test_what_the_profiler_saw_on_the_gpu_is_counted():
    """Kernels and copies of the GPU; not the host's events, and no named spans."""
    def event(kind, microseconds, named=False):
        span = type("Span", (), {"elapsed_us": lambda self: microseconds})()
        return type("Event", (), {"device_type": kind, "time_range": span, "is_user_annotation": named})()

    gpu, cpu = torch.autograd.DeviceType.CUDA, torch.autograd.DeviceType.CPU
    found = launches.counted([event(gpu, 10), event(gpu, 5), event(cpu, 100), event(gpu, 15, named=True)])
    assert found.count == 2 and found.seconds == pytest.approx(15e-6)


def test_an_unknown_kernel_is_a_sentence_with_the_known_ones():
    """Before anything is measured."""
    with pytest.raises(LabError, match=r"no benchmark of softmax.*rms_norm, qk_norm"):
        bench.check_ops(["rms_norm", "softmax"])
    assert bench.check_ops([]) == list(BENCHMARKS)


# ---- without a GPU, and pictures


@pytest.fixture(scope="module")
def predicted():
    """The report without a GPU, of all kernels, without counting."""
    return not_timed.predict_bench([], quick=True)


def test_the_report_without_a_gpu_is_whole(predicted):
    """Every op and direction with floor, bound, readings and the label; no times anywhere."""
    assert not predicted["header"]["timed"] and predicted["header"]["label"] == "not timed"
    assert {row["op"] for row in predicted["rows"]} == set(BENCHMARKS)
    for row in predicted["rows"]:
        assert row["label"] == "not timed" and "time_ms" not in row
        assert set(row["predicted"]) == {"H200 SXM", "RTX 5090"} and set(row["compiled"]) == {"sm_90", "sm_120"}
        assert all(each["floor_ms"] > 0 for each in row["predicted"].values())
    json.dumps(predicted)
    bounds = {(row["op"], row["direction"]): row["predicted"]["H200 SXM"]["bound"] for row in predicted["rows"]}
    assert bounds["cross_entropy", BACKWARD] == "memory" and bounds["linear_cross_entropy", BOTH] == "compute"
    assert bounds["holder_objective", FORWARD] == "launch"


def test_bytes_are_counted_in_a_process_that_interprets():
    """The count over the formula, in both directions; a kernel whose bytes torch moves is left out."""
    pytest.importorskip("triton")
    found = not_timed.counted_ratios(["rms_norm", "linear_cross_entropy"])
    assert set(found) == {"rms_norm"} and set(found["rms_norm"]) == {FORWARD, BACKWARD}
    assert all(each["ratio"] == pytest.approx(1, abs=0.02) for each in found["rms_norm"].values())


def measured(predicted: dict) -> dict:
    """A made-up report of a GPU: every pass at between a tenth and all of its predicted floor."""
    rows = []
    for i, row in enumerate(predicted["rows"]):
        reached = (0.1, 0.6, 0.8, 0.95)[i % 4]
        floor = row["predicted"]["H200 SXM"]
        known = {"impl": "ours", "floor_ms": floor["floor_ms"], "bound": floor["bound"], "fraction_of_floor": reached,
                 "time_ms": {"p20": 1, "p50": floor["floor_ms"] / reached, "p80": 2, "n": 20}, "ratio_vs": {},
                 "noise": 0.01, "targets": []}
        same = {name: row[name] for name in ("op", "direction", "bytes_floor", "flops")}
        rows.append(dict.fromkeys(contest.ROW) | same | known)
    header = predicted["header"] | {"timed": True, "device": "NVIDIA H200",
                                    "ceilings": {"copy_TBps": 4.8, "gemm_TFLOPs": 989.0}}
    return {"header": header, "rows": rows, "skipped": []}


@pytest.mark.parametrize("kind", ["predicted", "measured"])
def test_no_two_labels_of_the_picture_collide(predicted, kind):
    """Every point has a number, no two texts lie on each other, and the words say what is seen."""
    report = predicted if kind == "predicted" else measured(predicted)
    figure = roofline.bench_picture(report)
    figure.draw_without_rendering()
    renderer = figure.canvas.get_renderer()
    texts = [text for ax in figure.axes for text in ax.texts if text.get_text()]
    boxes = [(text.get_text(), text.get_window_extent(renderer)) for text in texts if not text.get_rotation()]
    for (first, a), (second, b) in itertools.combinations(boxes, 2):
        assert not (a.x0 < b.x1 and b.x0 < a.x1 and a.y0 + 1 < b.y1 and b.y0 + 1 < a.y1), (first, second)
    assert figure.bbox.x1 >= max(box.x1 for _, box in boxes)
    words = roofline.alt_text(report)
    assert all(row["op"] in words for row in report["rows"]) and kind in words
    hollow = {line.get_markerfacecolor() == "white" for line in figure.axes[0].lines if line.get_marker() != "None"}
    assert hollow == {kind == "predicted"}


def test_the_picture_is_saved_with_its_words(predicted, tmp_path):
    """A PNG, and a text beside it."""
    roofline.save_picture(predicted, tmp_path / "bench.png")
    assert (tmp_path / "bench.png").read_bytes()[1:4] == b"PNG"
    assert roofline.alt_text(predicted) in (tmp_path / "bench.txt").read_text()


def test_numbers_of_neighbours_are_joined():
    """Points that touch, also through a third, share a label."""
    places = [np.array(at, dtype=float) for at in ((0, 0), (8, 0), (100, 0), (16, 0))]
    assert roofline.touching(places) == [[0, 1, 3], [2]] and roofline.ranges([0, 1, 3]) == "1-2, 4"


def test_tables_of_both_kinds(predicted):
    """As many cells as columns; a ratio within the noise is called even; a failure shows its message."""
    for report in (predicted, measured(predicted)):
        title, columns, rows = bench_table.table_of(report)
        assert rows and all(len(row) == len(columns) for row in rows)
        assert ("Not timed" in title) is not report["header"]["timed"]
    assert bench_table.ratio_text({"p50": 1.02, "lo": 1.01, "hi": 1.03}, 0.05) == "even"
    assert bench_table.ratio_text({"p50": 1.5, "lo": 1.4, "hi": 1.6}, 0.05) == "1.50 (1.40 to 1.60)"
    failed = {"header": measured(predicted)["header"], "skipped": [], "rows": [
        dict.fromkeys(contest.ROW) | {"op": "rms_norm", "impl": "ours", "error": "RuntimeError: no"}]}
    assert "RuntimeError: no" in bench_table.table_of(failed)[2][0]
    assert any("CPU copies" in line for line in bench_table.remarks(predicted))
