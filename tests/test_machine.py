"""`labkit doctor` tells the truth about this machine, and names each thing that is missing with what mends it."""

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from labkit.course import machine, system
from labkit.course.machine import inspect_machine
from labkit.files import REPOSITORY

RTX_4090 = ("NVIDIA GeForce RTX 4090", 25.7, "8.9", "580.95")


def fake_torch(cuda="13.0", *, devices=(), built_for=("sm_80", "sm_90", "sm_120", "compute_120")):
    """Just what machine.py asks torch; a device is (name, GB, (major, minor))."""
    cards = [SimpleNamespace(name=name, total_memory=int(gb * 1e9), major=major, minor=minor)
             for name, gb, (major, minor) in devices]
    calls = SimpleNamespace(is_available=lambda: bool(cards), device_count=lambda: len(cards),
                            get_device_properties=lambda index: cards[index], get_arch_list=lambda: list(built_for))
    return SimpleNamespace(version=SimpleNamespace(cuda=cuda), cuda=calls)


def gpu_problem(monkeypatch, torch, driver=(RTX_4090,), scale="workstation", compiler="gcc"):
    """What the doctor says about the GPUs of a made-up machine: (what, fix), or None."""
    monkeypatch.setattr(system, "driver_gpus", lambda: list(driver))
    monkeypatch.setattr(machine, "c_compiler", lambda: compiler)
    found = machine.gpu_problems(system.find_gpus(torch), torch, scale)
    assert not any(problem.serious for problem in found)  # the CPU still works
    return (found[0].what, found[0].fix) if found else None


def test_this_machine_is_described_truthfully():
    """Against independent readings: psutil for memory and cores, the interpreter for versions."""
    psutil = pytest.importorskip("psutil")
    card = inspect_machine()
    assert 0 < card.memory_gb <= psutil.virtual_memory().total / 1e9 + 0.01
    assert 1 <= card.cores <= psutil.cpu_count()
    assert card.disk_free_gb == pytest.approx(psutil.disk_usage(str(REPOSITORY)).free / 1e9, abs=5)
    assert card.python == ".".join(map(str, sys.version_info[:3]))
    assert card.versions["torch"] == __import__("torch").__version__
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
    real = machine.version_of
    monkeypatch.setattr(machine, "version_of", lambda name: None if name == absent else real(name))
    problems = [problem for problem in machine.package_problems() if absent in problem.what]
    assert [problem.serious for problem in problems] == [serious] and problems[0].fix


def test_a_gpu_with_a_cpu_torch(monkeypatch):
    """The driver lists a GPU, torch was built without CUDA: reinstall."""
    what, _ = gpu_problem(monkeypatch, fake_torch(cuda=None))
    assert "RTX 4090" in what and "CPU build" in what


def test_a_driver_that_is_too_old(monkeypatch):
    """CUDA torch, GPU listed, none reachable: the driver, or a torch that fits it."""
    what, fix = gpu_problem(monkeypatch, fake_torch(), [("NVIDIA A100", 40.0, "8.0", "470.10")])
    assert "driver 470.10 is too old" in what and "--torch-backend=auto" in fix


def test_a_hidden_gpu(monkeypatch):
    """CUDA_VISIBLE_DEVICES= looks the same to torch, but the driver is not at fault."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert gpu_problem(monkeypatch, fake_torch())[1] == "unset CUDA_VISIBLE_DEVICES"


@pytest.mark.parametrize(("device", "sentence"), [
    (("GTX 1080 Ti", 11.7, (6, 1)), "too old"),
    (("Tesla T4", 15.8, (7, 5)), "bf16"),
    (("Future 1", 48.0, (13, 0)), "no code for"),
    (("RTX 4060", 8.6, (8, 9)), "may not fit"),
])
def test_a_gpu_that_will_not_do(monkeypatch, device, sentence):
    """Too old, unknown to this torch, too small: each explained, until the learner stays on the CPU."""
    torch = fake_torch(devices=[device], built_for=("sm_75", "sm_80", "sm_90"))
    what, fix = gpu_problem(monkeypatch, torch)
    assert sentence in what and fix == machine.STAY_ON_CPU
    assert gpu_problem(monkeypatch, torch, scale="quick") is None


def test_a_good_gpu_gives_no_problem_and_stands_on_the_card(monkeypatch):
    """24 GB cards report 25.3 GB of 10^9 bytes; all is well, and driver and capability are shown."""
    torch = fake_torch(devices=[("NVIDIA GeForce RTX 4090", 25.3, (8, 9))])
    assert gpu_problem(monkeypatch, torch) is None
    (card,) = system.find_gpus(torch)
    assert (card.capability, card.driver, card.usable) == ("8.9", "580.95", True)


def test_a_gpu_without_a_c_compiler(monkeypatch):
    """Triton cannot launch without one: the doctor says so before a lab is silently slow."""
    torch = fake_torch(devices=[("NVIDIA GeForce RTX 4090", 25.3, (8, 9))])
    what, fix = gpu_problem(monkeypatch, torch, compiler=None)
    assert "C compiler" in what and "install gcc" in fix
    assert gpu_problem(monkeypatch, torch, scale="quick", compiler=None) is None


@pytest.mark.parametrize(("capability", "architectures", "serves"), [
    ((8, 9), ["sm_80"], True),  # same major number, older minor
    ((9, 0), ["sm_80"], False),  # machine code does not cross major numbers
    ((8, 0), ["sm_86"], False),  # nor does it run on an older card
    ((12, 0), ["sm_80", "compute_90"], True),  # PTX is compiled by the driver for any later card
    ((6, 1), ["sm_75", "compute_75"], False),
    ((9, 0), ["sm_90a"], True),
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
    problems = machine.version_problems(versions)
    assert (problems == []) if word is None else word in problems[0].what + problems[0].fix


def test_a_container_limit_counts(monkeypatch):
    """Inside a container the limit is what a lab can use, not the host's memory."""
    monkeypatch.setattr(Path, "read_text", lambda self, **_: "2000000000\n")
    assert system.memory_gb() == 2.0
    assert any("2.0 GB of memory" in problem.what for problem in machine.resource_problems(50, 2.0))
    assert [problem.serious for problem in machine.resource_problems(0.01, 16)] == [True]
