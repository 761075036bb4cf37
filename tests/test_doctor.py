"""`labkit doctor` on machines that are not this one: each is simulated whole, and gets one sentence, what follows,
and what to set. Where nothing is wrong it is silent, and says what runs."""

import platform
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from labkit.course import doctor_gpu, doctor_packages, doctor_place, doctor_scales, header, machine, system

RTX_4090 = ("NVIDIA GeForce RTX 4090", 25.3, (8, 9))  # a card of 24 GiB reports 25.3 GB of 10^9 bytes
LABS = {"01": header.Header("", "", {"quick": 0.5, "desk": 5.0}, {"quick": 0.6, "desk": 1.0, "workstation": 6.0}),
        "02": header.Header("", "", {"quick": 1.0, "desk": 41.0}, {"quick": 2.7, "desk": 2.7, "workstation": 14.0})}
NOT_MEASURED = {lab: header.Header("", "", head.minutes, {}) for lab, head in LABS.items()}


def fake_torch(card=None, *, cuda="13.0", built_for=("sm_75", "sm_80", "sm_90", "sm_120"), hip=None):
    """Just what the doctor asks torch; `card` is (name, GB, (major, minor)), or None where torch reaches none."""
    name, gb, (major, minor) = card or ("", 0, (0, 0))
    properties = SimpleNamespace(name=name, total_memory=int(gb * 1e9), major=major, minor=minor)
    return SimpleNamespace(version=SimpleNamespace(cuda=cuda, hip=hip), cuda=SimpleNamespace(
        is_available=lambda: card is not None, device_count=lambda: 1, get_device_properties=lambda index: properties,
        get_device_name=lambda: name, get_device_capability=lambda: (major, minor),
        get_arch_list=lambda: list(built_for)))


@pytest.fixture
def simulate(monkeypatch):
    """Look at a made-up machine: what it has, by keyword; returns its card."""
    def look(torch=None, *, listed=(), complaint="", plugged_in=False, compiler="gcc", cores=8, memory=32.0, disk=100.0,
             kind=("Linux", "x86_64", "6.1.0"), place="/home/ada/lab", labs=LABS, variables=(), without=()):
        monkeypatch.setitem(sys.modules, "torch", torch)
        monkeypatch.delenv("LABKIT_SCALE", raising=False)
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        for name, value in variables:
            monkeypatch.setenv(name, value)
        versions = {"torch": "2.13.0", "triton": "3.7.1", "numpy": "2.4.6"}
        answers = {(system, "driver_gpus"): list(listed), (doctor_gpu, "driver_complaint"): complaint,
                   (doctor_gpu, "is_nvidia_plugged_in"): plugged_in, (doctor_gpu, "c_compiler"): compiler,
                   (machine, "core_count"): cores, (machine, "memory_gb"): memory, (doctor_scales, "_headers"): labs,
                   (platform, "system"): kind[0], (platform, "machine"): kind[1], (platform, "release"): kind[2]}
        for (module, name), answer in answers.items():
            monkeypatch.setattr(module, name, lambda answer=answer: answer)
        for module in (machine, doctor_packages):
            monkeypatch.setattr(module, "version_of",
                                lambda name: None if name in without else versions.get(name, "1.0"))
        monkeypatch.setattr(machine.shutil, "disk_usage", lambda path: SimpleNamespace(free=disk * 1e9))
        monkeypatch.setattr(doctor_place, "REPOSITORY", Path(place))
        return machine.inspect_machine()

    return look


def driver(version):
    """What nvidia-smi lists for a 4090 with this driver."""
    return [(RTX_4090[0], RTX_4090[1], "8.9", version)]


WSL = ("Linux", "x86_64", "5.15.167-microsoft-standard-WSL2")
OLD, NEW = ("GTX 1080 Ti", 11.7, (6, 1)), ("Future 1", 48.0, (13, 0))
CASES = {  # what the machine has; the scale that labs choose; words of: what is wrong, what follows, how to mend it
    "a CPU build of torch beside a GPU": (
        {"torch": fake_torch(cuda=None), "listed": driver("580.95")}, "quick", "CPU build", "on the CPU", "install"),
    "a driver too old for every torch": (
        {"torch": fake_torch(), "listed": driver("470.10")}, "quick", "CUDA 13.0 needs 580", "on the CPU",
        "update NVIDIA's driver and restart"),
    "a driver too old for this torch": (
        {"torch": fake_torch(), "listed": driver("550.54")}, "quick", "Driver 550.54", "on the CPU",
        "--torch-backend=auto"),
    "an old driver around WSL": (
        {"torch": fake_torch(), "listed": driver("550.54"), "kind": WSL}, "quick", "Driver 550.54", "on the CPU",
        "in Windows, not inside WSL"),
    "a driver that should do": (
        {"torch": fake_torch(), "listed": driver("580.95")}, "quick", "580.95 is new enough", "on the CPU", "restart"),
    "a driver with an odd version": (
        {"torch": fake_torch(), "listed": driver("[N/A]")}, "quick", "new enough", "on the CPU", "restart"),
    "a hidden GPU": (
        {"torch": fake_torch(), "listed": driver("580.95"), "variables": [("CUDA_VISIBLE_DEVICES", "")]}, "quick",
        "CUDA_VISIBLE_DEVICES hides", "on the CPU", "unset CUDA_VISIBLE_DEVICES"),
    "a driver that does not answer": (
        {"torch": fake_torch(), "complaint": "Driver/library version mismatch"}, "quick", "version mismatch",
        "on the CPU", "restart the machine"),
    "a GPU without a driver": (
        {"torch": fake_torch(cuda=None), "plugged_in": True}, "quick", "no driver", "on the CPU", "until nvidia-smi"),
    "a GPU that is too old": (
        {"torch": fake_torch(OLD)}, "quick", "too old (compute capability 6.1", "at quick scale", "LABKIT_SCALE=desk"),
    "a GPU without bf16": (
        {"torch": fake_torch(("Tesla T4", 15.8, (7, 5)))}, "quick", "bf16", "at quick scale", "LABKIT_SCALE=desk"),
    "a GPU newer than torch": (
        {"torch": fake_torch(NEW)}, "quick", "no code for compute capability 13.0", "quick", "LABKIT_SCALE=desk"),
    "a GPU of AMD's": (
        {"torch": fake_torch(("MI300", 192.0, (9, 4)), built_for=("gfx942",), hip="7.0")}, "quick", "AMD", "quick",
        "LABKIT_SCALE=desk"),
    "an old GPU, insisted on": (
        {"torch": fake_torch(OLD), "variables": [("LABKIT_SCALE", "workstation")]}, "workstation", "too old",
        "do not run", "LABKIT_SCALE=quick"),
    "a small GPU": (
        {"torch": fake_torch(("RTX 4060", 8.6, (8, 9)))}, "workstation", "has 9 GB", "02 (14 GB)",
        "LABKIT_SCALE=quick"),
    "a small GPU, labs not measured": (
        {"torch": fake_torch(("RTX 4060", 8.6, (8, 9))), "labs": NOT_MEASURED}, "workstation", "may not fit",
        "CUDA out of memory", "LABKIT_SCALE=quick"),
    "no C compiler": (
        {"torch": fake_torch(RTX_4090), "compiler": None}, "workstation", "no C compiler", "slower", "install gcc"),
    "one core": ({"torch": fake_torch(), "cores": 1}, "quick", "one core", "twice the minutes", "two cores"),
    "little memory": (
        {"torch": fake_torch(), "memory": 3.2}, "quick", "3.2 GB of memory", "02 (2.7 GB)", "close other programs"),
    "little memory in WSL": (
        {"torch": fake_torch(), "memory": 3.2, "kind": WSL}, "quick", "3.2 GB of memory", "02 (2.7 GB)", ".wslconfig"),
    "little disk": ({"torch": fake_torch(), "disk": 0.4}, "quick", "0.4 GB of disk", "stops", "free some space"),
    "a Windows drive": (
        {"torch": fake_torch(), "kind": WSL, "place": "/mnt/c/lab"}, "quick", "Windows drive (/mnt/c/lab)",
        "many times as long", "cd ~"),
    "no triton": ({"torch": fake_torch(), "without": ["triton"]}, "quick", "triton", "lab 01 does not run", "install"),
    "no JupyterLab": ({"torch": fake_torch(), "without": ["jupyterlab"]}, "quick", "jupyterlab", "in-process", "inst"),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_wrong_what_follows_and_what_to_set(simulate, case):
    """One problem, none of them serious, since quick scale runs; its three parts name the right thing, in its words."""
    has, scale, what, follows, fix = CASES[case]
    card = simulate(**has)
    (problem,) = card.problems
    assert card.scale == scale and card.healthy
    assert what in problem.what and follows in problem.follows and fix in problem.fix
    assert str(problem).startswith("Note: ") and "What follows: " in str(problem) and "To mend it: " in str(problem)


@pytest.mark.parametrize("has", [
    {"torch": fake_torch()},
    {"torch": fake_torch(RTX_4090)},
    {"torch": fake_torch(), "kind": WSL, "cores": 2, "memory": 4.0},
    {"torch": fake_torch(), "place": "/mnt/data/lab"},  # a Linux server's disk is no Windows drive
    {"torch": fake_torch(OLD), "variables": [("LABKIT_SCALE", "quick")]},  # the learner has chosen
    {"torch": fake_torch(("RTX 4060", 8.6, (8, 9))), "variables": [("LABKIT_SCALE", "desk")]},
    {"torch": fake_torch(), "without": ["triton"], "kind": ("Darwin", "arm64", "24.0")},
], ids=["no GPU", "a 4090", "WSL", "a disk in /mnt", "an old GPU, quick chosen", "a small one, desk chosen", "macOS"])
def test_where_nothing_is_wrong_it_is_silent(simulate, has):
    """No note at all: a doctor that complains about everything is not read."""
    assert simulate(**has).problems == ()


def test_what_stops_every_lab_is_serious(simulate):
    """A full disk, and an Intel Mac, for which no torch exists: exit status 1, and nothing to install is suggested."""
    assert not simulate(fake_torch(), disk=0.05).healthy
    card = simulate(None, kind=("Darwin", "x86_64", "24.0"), without=["torch", "triton"])
    assert not card.healthy and card.scale == "none"
    assert "Intel" in card.problems[0].what and "install" not in card.problems[0].fix


def test_a_mac_is_told_what_its_gpu_is_for(simulate):
    """Apple's GPU stands on the card, with the reason why no lab uses it."""
    card = simulate(fake_torch(cuda=None), without=["triton"], kind=("Darwin", "arm64", "24.0"))
    rows = {name: (value, note) for name, value, note in card.rows()}
    assert rows["GPU"][0] == "Apple" and "not used" in rows["GPU"][1] and "Linux only" in rows["triton"][1]
    assert rows["system"][0].startswith("macOS")


def test_what_runs_here(simulate):
    """Each scale: labs that fit with room to spare, their minutes added up, and the setting; by hand from LABS."""
    def rows(**has):
        return [forecast.row("quick") for forecast in simulate(**has).runs]

    quick, desk, workstation = rows(torch=fake_torch())
    assert quick == ("quick", "all 2", "0.5 to 1 min a lab, 1.5 min together", "chosen here")
    assert desk == ("desk", "all 2", "5 to 41 min a lab, 46 min together", "LABKIT_SCALE=desk")
    assert workstation[1:3] == ("none", "") and "NVIDIA GPU" in workstation[3]
    assert rows(torch=fake_torch(), memory=3.6)[0][1:3] == ("1; not 02 (2.7 GB)", "0.5 min a lab, 0.5 min together")
    assert rows(torch=fake_torch(("RTX 4070", 12.9, (8, 9))))[2] == (
        "workstation", "1; not 02 (14 GB)", "not measured yet", "LABKIT_SCALE=workstation")
    assert rows(torch=fake_torch(RTX_4090))[2][1] == "all 2" and "too old" in rows(torch=fake_torch(OLD))[2][3]


def test_no_older_torch_is_offered_where_none_would_fit(simulate):
    """Every build of this torch needs CUDA 12 or later, and so driver 525 or later."""
    for version, offered in (("470.10", False), ("524.99", False), ("525.60", True), ("575.10", True)):
        (problem,) = simulate(fake_torch(), listed=driver(version)).problems
        assert ("--torch-backend" in problem.fix) is offered and "update NVIDIA's driver" in problem.fix


def test_a_torn_notebook_does_not_silence_the_doctor(monkeypatch, tmp_path):
    """The forecast leaves it out."""
    monkeypatch.setattr(header, "NOTEBOOKS", tmp_path)
    (tmp_path / "02_torn.ipynb").write_text("{")
    assert [forecast.fitting for forecast in doctor_scales.forecast(8.0, 24.0, "")] == [(), (), ()]
