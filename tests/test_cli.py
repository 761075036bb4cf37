"""The `labkit` command: every table also as JSON, mistakes as one sentence with status 1, help without waiting."""

import json
import subprocess
import sys

import pytest
from notebooks_bad import build

from labkit import cli
from labkit.course import header, record, results
from labkit.course.ledger import KEYS
from labkit.files import REPOSITORY


@pytest.fixture
def labkit(monkeypatch, capsys, tmp_path):
    """Call the command on a folder with one lab, which has results at desk scale: (status, stdout, stderr)."""
    monkeypatch.setattr(header, "NOTEBOOKS", tmp_path)
    monkeypatch.setattr(results, "RESULTS", tmp_path / "results")
    monkeypatch.setenv("COLUMNS", "120")
    build.write(tmp_path / "98_lab.ipynb", build.good())
    (tmp_path / "results/desk").mkdir(parents=True)
    result = {**dict.fromkeys(results.FIELDS), "notebook": "98", "scale": "desk", "rows": []}
    (tmp_path / "results/desk/98.json").write_text(json.dumps(result))

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["labkit", *arguments])
        try:
            cli.main()
            status = 0
        except SystemExit as stop:
            status = int(stop.code or 0)
        return status, *capsys.readouterr()

    return call


@pytest.mark.parametrize("command", [[], ["doctor"], ["list"], ["run"], ["claims"], ["bench"], ["handout"]])
def test_help_says_what_each_command_does(labkit, command):
    """Status 0, the name of the command, and its first sentence."""
    status, out, _ = labkit(*command, "--help")
    assert status == 0 and "Usage" in out and " ".join(["labkit", *command]) in out


def test_list_shows_question_minutes_and_results(labkit):
    """As a table and as JSON; what nobody has measured is null."""
    status, out, _ = labkit("list")
    assert status == 0 and "Does it hold?" in out and "quick 0.5" in out and "desk" in out
    (lab,) = json.loads(labkit("list", "--json")[1])
    assert (lab["notebook"], lab["title"], lab["results"]) == ("98", "A lab", ["desk"])
    assert lab["minutes"] == {"quick": 0.5, "desk": None, "workstation": None}


def test_doctor_exits_with_what_it_found(labkit, monkeypatch):
    """The same machine as card and as JSON; status 1 and the mending command when something serious is missing."""
    from labkit.course import machine

    status, out, _ = labkit("doctor", "--json")
    assert json.loads(out)["healthy"] is (status == 0)
    out = labkit("doctor")[1]
    assert "scale" in out and "What runs here" in out and "LABKIT_SCALE=desk" in out
    problem = machine.Problem("torch is missing.", "make install", serious=True)
    monkeypatch.setattr(machine, "package_problems", lambda: [problem])
    status, out, _ = labkit("doctor")
    assert status == 1 and "torch is missing." in out and "make install" in out


def test_claims_have_the_keys_of_the_ledger_and_are_filtered(labkit):
    """Objects with exactly the ledger's keys; --notebook and --verdict choose among them."""
    rows = json.loads(labkit("claims", "--json")[1])
    assert rows and all(tuple(row) == KEYS for row in rows)
    some = json.loads(labkit("claims", "--json", "--notebook", "02", "--verdict", "not testable here")[1])
    assert some == [row for row in rows if row["notebook"] == "02" and row["verdict"] == "not testable here"]
    assert labkit("claims", "--notebook", "2")[0] == 0
    for key, wrong in (("notebook", "77"), ("verdict", "reproducd")):
        status, _, error = labkit("claims", f"--{key}", wrong)
        assert status == 1 and wrong in error and "There are: " in error


def test_bench_prints_both_ceilings(labkit, monkeypatch):
    """The two rates with their spread, and the ridge between them."""
    from labkit.measure import ceilings

    rate = ceilings.Rate(median=2e10, p20=1e10, p80=3e10, repeats=5, size=1)
    found = ceilings.Ceilings("CPU", "float32", 1, copy=rate, matmul=ceilings.Rate(8e10, 7e10, 9e10, 5, 1024))
    monkeypatch.setattr(ceilings, "measure_ceilings", lambda device: found)
    out = labkit("bench", "--ceilings")[1]
    assert "20.0 GB/s" in out and "80.0 GFLOP/s" in out and "fewer than 4 FLOP a byte" in out
    assert json.loads(labkit("bench", "--ceilings", "--json")[1])["copy"]["median"] == 2e10


def test_bench_without_a_gpu_predicts(labkit, monkeypatch, tmp_path):
    """A table that says "Not timed"; --json, --out with a picture; an unknown kernel is refused by name."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    status, out, _ = labkit("bench", "rms_norm", "--quick")
    assert status == 0 and "Not timed" in out and "rms_norm" in out and "memory" in out
    status, out, _ = labkit("bench", "rms_norm", "--quick", "--json", "--out", str(tmp_path / "r.json"))
    report = json.loads(out)
    assert status == 0 and {row["op"] for row in report["rows"]} == {"rms_norm"} and not report["header"]["timed"]
    assert json.loads((tmp_path / "r.json").read_text()) == report and (tmp_path / "r.png").exists()
    status, out, err = labkit("bench", "softmax")
    assert (status, out) == (1, "") and "There is no benchmark of softmax." in err and "rms_norm" in err


def test_bench_on_a_gpu_keeps_a_full_run_and_fails_with_a_kernel(labkit, monkeypatch, tmp_path):
    """All kernels: the device's folder gets report and picture, though one failed, which is status 1. Some: nothing."""
    from labkit.course import roofline
    from labkit.measure import bench

    header = {"timed": True, "device": "NVIDIA H200", "ceilings": {"copy_TBps": 4.3, "gemm_TFLOPs": 790.0},
              "torch": "2.11", "triton": "3.6"}

    def run_bench(ops, device, *, seconds, quick, commit, save):
        failed = {"op": ops[0], "impl": "ours", "error": "RuntimeError: no", "flops": None}
        report = {"header": header, "rows": [failed], "skipped": []}
        save(report)
        return report

    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda *_: "NVIDIA H200")
    monkeypatch.setattr(bench, "run_bench", run_bench)
    monkeypatch.setattr(roofline, "save_picture", lambda report, path: path.write_text("drawn"))
    status, out, _ = labkit("bench", "rms_norm")
    assert status == 1 and "RuntimeError: no" in out and not list(tmp_path.rglob("bench.json"))
    assert labkit("bench")[0] == 1
    folder = tmp_path / "results/workstation/nvidia-h200"
    assert json.loads((folder / "bench.json").read_text())["rows"][0]["error"] and (folder / "bench.png").exists()


def test_mistakes_are_one_sentence_on_stderr(labkit):
    """Status 1 and no traceback: an unknown lab, an unknown scale, a notebook that can't be read."""
    for arguments, words in ((["run", "97"], "There is no notebook '97'."),
                             (["run", "98", "--scale", "huge"], "There is no scale named 'huge'."),
                             (["run", "98", "--scale", "desk", "--save"], "Only a run at quick scale")):
        status, out, err = labkit(*arguments)
        assert (status, out) == (1, "") and err.startswith(words) and len(err.splitlines()) == 1
    (header.NOTEBOOKS / "99_torn.ipynb").write_text("{")
    assert labkit("list")[0] == 1


def test_help_and_list_do_not_wait_for_torch():
    """A command that prints a list must not spend seconds importing what it does not use."""
    program = """
import sys
from labkit import cli
sys.argv = ["labkit", "list"]
cli.main()
heavy = {"torch", "numpy", "matplotlib", "IPython", "ipywidgets", "nbformat"} & set(sys.modules)
sys.exit(f"imported: {sorted(heavy)}" if heavy else 0)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_a_reader_that_leaves_is_no_error():
    """`labkit list | head -1` ends quietly."""
    command = f"{sys.executable} -m labkit.cli claims --json | head -1"
    done = subprocess.run(["bash", "-c", command], cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[" and done.stderr == ""


def test_device_folders_have_plain_names():
    """Results of a GPU lie under a name that every file system takes."""
    assert record.device_slug("NVIDIA RTX PRO 6000 (Blackwell)") == "nvidia-rtx-pro-6000-blackwell"
    assert record.result_folder("workstation", "NVIDIA H200") == results.RESULTS / "workstation/nvidia-h200"
