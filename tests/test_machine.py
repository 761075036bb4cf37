"""`labkit doctor` tells the truth about this machine, and names each thing that is missing with what mends it."""

import json
import os
import sys
from pathlib import Path

import pytest

from labkit.course import doctor_packages, system
from labkit.course.machine import inspect_machine
from labkit.files import REPOSITORY


def test_this_machine_is_described_truthfully():
    """Against independent readings: psutil for memory and cores, the interpreter for versions."""
    psutil = pytest.importorskip("psutil")
    card = inspect_machine()
    assert 0 < card.memory_gb <= psutil.virtual_memory().total / 1e9 + 0.01
    assert 1 <= card.cores <= psutil.cpu_count()
    assert card.disk_free_gb == pytest.approx(psutil.disk_usage(str(REPOSITORY)).free / 1e9, abs=5)
    assert card.python == ".".join(map(str, sys.version_info[:3]))
    installed, reported = card.versions["torch"], __import__("torch").__version__
    assert reported in (installed, f"{installed}+cu{card.cuda.replace('.', '')}" if card.cuda else installed)
    assert card.cpu and card.system and card.reason


def test_the_card_is_readable_and_plain_data():
    """Three texts a row; --json survives the round trip and carries the verdict that decides the exit status."""
    card = inspect_machine()
    assert all(len(row) == 3 and all(isinstance(text, str) for text in row) for row in card.rows())
    assert {"CPU", "memory", "free disk", "Python", "torch", "GPU", "scale"} <= {name for name, _, _ in card.rows()}
    again = json.loads(json.dumps(card.as_json()))
    assert again["healthy"] is card.healthy and again["scale"] == card.scale


def test_scale_and_reason_are_those_of_the_labs(monkeypatch):
    """The doctor asks the same function as a lab, so LABKIT_SCALE shows up in both."""
    monkeypatch.setenv("LABKIT_SCALE", "desk")
    card = inspect_machine()
    assert card.scale == "desk" and "LABKIT_SCALE" in card.reason


def test_an_unknown_scale_is_serious_and_named(monkeypatch):
    """It stops every lab, so the exit status must say so; the sentence lists the scales."""
    monkeypatch.setenv("LABKIT_SCALE", "gigantic")
    card = inspect_machine()
    assert not card.healthy
    assert any("gigantic" in problem.what and "quick, desk, workstation" in problem.fix for problem in card.problems)


def test_a_missing_torch_is_reported_not_raised(monkeypatch):
    """The doctor is what one runs when something is missing, so it must live without it."""
    monkeypatch.setitem(sys.modules, "torch", None)  # import torch now raises ImportError
    card = inspect_machine()
    assert not card.healthy and card.scale == "none" and card.cuda is None
    assert any("torch" in problem.what and problem.serious for problem in card.problems)


@pytest.mark.parametrize(("absent", "serious"), [("safetensors", True), ("jupyterlab", False)])
def test_missing_packages(monkeypatch, absent, serious):
    """What every lab needs is serious; what only JupyterLab needs is not, since a bare server runs without it."""
    real = doctor_packages.version_of
    monkeypatch.setattr(doctor_packages, "version_of", lambda name: None if name == absent else real(name))
    problems = [problem for problem in doctor_packages.package_problems() if absent in problem.what]
    assert [problem.serious for problem in problems] == [serious] and problems[0].fix


@pytest.mark.parametrize(("capability", "architectures", "serves"), [
    ((8, 9), ["sm_80"], True),  # same major number, older minor
    ((9, 0), ["sm_80"], False),  # machine code does not cross major numbers
    ((8, 0), ["sm_86"], False),  # nor does it run on an older card
    ((12, 0), ["sm_80", "compute_90"], True),  # PTX is compiled by the driver for any later card
    ((6, 1), ["sm_75", "compute_75"], False),
    ((9, 0), ["sm_90a"], True),
    ((9, 0), ["gfx90a", "gfx942"], False),  # AMD's names are no NVIDIA architecture, and no reason to stop
])
def test_which_cards_a_torch_was_built_for(capability, architectures, serves):
    """CUDA's compatibility rules, case by case."""
    assert system.is_built_for(capability, architectures) is serves


def test_nvidia_smi_is_read(monkeypatch, tmp_path):
    """A stand-in nvidia-smi on PATH: fields, MiB to GB, and a unified-memory card whose memory is '[N/A]'."""
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'NVIDIA H200, 143771, 9.0, 570.1'\necho 'NVIDIA GB10, [N/A], 12.1, 580.2'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    first, second = system.driver_gpus()
    assert first == ("NVIDIA H200", pytest.approx(150.8, abs=0.1), "9.0", "570.1") and second[1] == 0.0


@pytest.mark.parametrize(("versions", "word"), [
    ({"torch": "2.13.0+cpu", "triton": "3.7.1", "numpy": "2.4.6"}, None),
    ({"torch": "2.11.0", "triton": "3.6.0", "numpy": "2.4.6"}, "numpy<2.4"),
    ({"torch": "2.11.0", "triton": "3.6.0", "numpy": "2.3.5"}, None),
    ({"torch": "2.9.1", "triton": None, "numpy": "2.3.5"}, "2.11"),
    ({"torch": "2.13.0", "triton": "3.10.0", "numpy": "2.4.6"}, "3.10"),
])
def test_known_bad_combinations(versions, word):
    """Ranges of pyproject.toml, and triton 3.6's interpreter that fails with numpy 2.4."""
    problems = doctor_packages.version_problems(versions)
    assert (problems == []) if word is None else word in problems[0].what + problems[0].fix


def test_a_container_limit_counts(monkeypatch):
    """Inside a container the limit is what a lab can use, not the host's memory."""
    monkeypatch.setattr(Path, "read_text", lambda self, **_: "2000000000\n")
    assert system.memory_gb() == 2.0


def test_a_driver_that_fails_is_quoted(monkeypatch, tmp_path):
    """nvidia-smi's own first line; nothing where it answers, or is not there."""
    tool = tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert system.driver_complaint() == ""
    for script, said in (("echo 'GPU 0: H200'", ""), ("exit 9", "status 9"),
                         ("echo 'Failed to initialize NVML: Driver/library version mismatch'; echo more; exit 18",
                          "Failed to initialize NVML: Driver/library version mismatch")):
        tool.write_text(f"#!/bin/sh\n{script}\n")
        tool.chmod(0o755)
        assert system.driver_complaint() == said


@pytest.mark.parametrize(("vendor", "kind", "is_one"), [
    ("0x10de", "0x030000", True), ("0x10de", "0x030200", True),  # a VGA card, and one without a display
    ("0x10de", "0x040300", False), ("0x8086", "0x030000", False),  # the card's sound, and Intel's graphics
])
def test_a_gpu_without_a_driver_is_seen_on_the_bus(tmp_path, vendor, kind, is_one):
    """Vendor and class as the PCI specification numbers them; a device that tells nothing is passed over."""
    (tmp_path / "0000:01:00.0").mkdir()
    (tmp_path / "0000:02:00.0").mkdir()
    (tmp_path / "0000:01:00.0" / "vendor").write_text(f"{vendor}\n")
    (tmp_path / "0000:01:00.0" / "class").write_text(f"{kind}\n")
    assert system.is_nvidia_plugged_in(tmp_path) is is_one
