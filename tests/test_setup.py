"""Setting up: pins inside ranges, the right torch for each machine, no hidden error, nothing half done, true papers."""

import inspect
import json
import os
import re
import shutil
import stat
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from labkit import install
from labkit.errors import LabError
from labkit.files import REPOSITORY

requirements = pytest.importorskip("packaging.requirements")
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
NETWORK_WORDS = ("error sending request", "dns error", "Could not connect", "Failed to fetch", "timed out", "offline")


def ranges() -> list:
    """Every requirement of pyproject.toml, extras included."""
    extras = [text for group in PROJECT["optional-dependencies"].values() for text in group]
    return [requirements.Requirement(text) for text in [*PROJECT["dependencies"], *extras]]


def pins() -> dict[str, list[str]]:
    """name -> pinned versions (two where the version depends on Python)."""
    found: dict[str, list[str]] = {}
    for line in (REPOSITORY / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            pin = requirements.Requirement(line)
            (specifier,) = pin.specifier
            assert specifier.operator == "==", line
            found.setdefault(pin.name, []).append(specifier.version)
    return found


def uv() -> Path:
    """The uv of this environment."""
    path = Path(sys.executable).with_name("uv")
    if not path.exists():
        pytest.skip("uv is not installed in this environment")
    return path


# versions --------------------------------------------------------------------------------------------------------


def test_every_dependency_is_pinned_inside_its_range():
    """A pin outside the range would make `make install` impossible; a missing one would let it drift."""
    pinned = pins()
    for requirement in ranges():
        assert requirement.name in pinned, f"{requirement.name} has no pin"
        assert all(requirement.specifier.contains(version) for version in pinned[requirement.name]), requirement


def test_the_promised_ranges():
    """What the README says: torch 2.11 to 2.13, triton 3.6 to 3.9 on Linux only, Python 3.11 to 3.13."""
    by_name = {requirement.name: requirement for requirement in ranges()}
    torch, triton = by_name["torch"], by_name["triton"]
    assert [torch.specifier.contains(v) for v in ("2.10.9", "2.11.0", "2.13.1", "2.14.0")] == [False, True, True, False]
    assert [triton.specifier.contains(v) for v in ("3.5.1", "3.6.0", "3.9.0", "3.10.0")] == [False, True, True, False]
    assert [triton.marker.evaluate({"platform_system": system}) for system in ("Linux", "Darwin")] == [True, False]
    python = requirements.SpecifierSet(PROJECT["requires-python"])
    assert [python.contains(v) for v in ("3.10.9", "3.11.0", "3.13.9", "3.14.0")] == [False, True, True, False]


def resolve(tmp_path, python: str, platform: str) -> dict[str, str]:
    """uv's dry run into an empty environment of another platform, without any wheel folder: package -> version."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("UV_", "PIP_", "VIRTUAL_ENV"))}
    clean["MACOSX_DEPLOYMENT_TARGET"] = f"{install.OLDEST_MACOS}.0"
    command = [uv(), "pip", "install", "--dry-run", "--no-config", "--target", tmp_path / "empty", "--python",
               sys.executable, "--python-version", python, "--python-platform", platform, "--only-binary", ":all:",
               "--constraint", "constraints.txt", "--requirement", "pyproject.toml", "--extra", "dev"]
    answer = subprocess.run(command, cwd=REPOSITORY, env=clean, capture_output=True, text=True, timeout=120)
    if answer.returncode and any(word in answer.stderr for word in NETWORK_WORDS):
        pytest.skip(f"the package index cannot be reached: {answer.stderr.strip().splitlines()[-1]}")
    assert answer.returncode == 0, answer.stderr
    return dict(re.findall(r"^ \+ (\S+)==(\S+)", answer.stderr, re.MULTILINE))


@pytest.mark.parametrize("python", ["3.11", "3.13"])
def test_a_gpu_user_gets_cuda_torch_with_its_own_triton(tmp_path, python):
    """Linux on a PC: torch's CUDA build, no conflict."""
    chosen = resolve(tmp_path, python, "x86_64-manylinux_2_28")
    assert chosen["torch"] == "2.13.0" and chosen["triton"] == "3.7.1"
    assert any(name.startswith("nvidia-cublas") for name in chosen)


@pytest.mark.parametrize(("python", "platform"), [("3.11", "aarch64-apple-darwin"), ("3.13", "aarch64-apple-darwin"),
                                                  ("3.12", "aarch64-manylinux_2_28")])
def test_other_platforms_find_a_wheel_of_every_pin(tmp_path, python, platform):
    """The oldest macOS that the set-up lets through, without triton, and Linux on ARM. Only wheels count."""
    chosen = resolve(tmp_path, python, platform)
    assert chosen["torch"] == "2.13.0" and ("triton" in chosen) == ("darwin" not in platform)


def test_conda_file_gives_the_same():
    """Its specs parse as conda's match specs, Python fits pyproject's range, and pip takes our list with our pins."""
    yaml, rattler = pytest.importorskip("yaml"), pytest.importorskip("rattler")
    wanted = yaml.safe_load((REPOSITORY / "environment.yml").read_text(encoding="utf-8"))["dependencies"]
    specs = {spec.name.normalized: spec for spec in map(rattler.MatchSpec, [d for d in wanted if isinstance(d, str)])}
    (pip,) = [d["pip"] for d in wanted if isinstance(d, dict)]
    assert set(specs) == {"python", "pip"} and pip == ["-c constraints.txt", "-e .[dev]"]
    assert str(specs["python"].version).strip("=.*") == "3.11"
    assert requirements.SpecifierSet(PROJECT["requires-python"]).contains("3.11.9")


# labkit.install --------------------------------------------------------------------------------------------------


@pytest.fixture
def steps(monkeypatch, tmp_path):
    """Commands that the set-up would run, recorded; put a word into `failing` and commands with it fail."""
    commands, failing = [], []

    def run(command, without_links=False, said=None):
        commands.append(" ".join(command) + (" [no links]" if without_links else ""))
        if said is not None:
            said.extend(word for word in failing if word.startswith("pip says"))
        return int(any(word in commands[-1] for word in failing))

    monkeypatch.setattr(install, "run", run)
    monkeypatch.setattr(install.platform, "system", lambda: "Linux")
    monkeypatch.setattr(install.platform, "machine", lambda: "x86_64")
    monkeypatch.chdir(REPOSITORY)
    (tmp_path / "bin").mkdir()
    return tmp_path, commands, failing


def wheel_folder(tmp_path, version=None) -> str:
    """A folder with an (empty) CPU wheel of torch for this Python."""
    folder, tag = tmp_path / "wheels", f"cp{sys.version_info.major}{sys.version_info.minor}"
    folder.mkdir()
    (folder / f"torch-{version or pins()['torch'][0]}+cpu-{tag}-{tag}-manylinux_2_28_x86_64.whl").touch()
    return str(folder)


def test_without_a_gpu_a_wheel_at_hand_is_taken(steps):
    """torch comes first, from the folder; then the rest, from the same folder and the same pins."""
    venv, commands, _ = steps
    folder = wheel_folder(venv)
    install.install(venv, nvidia=False, links=folder)
    _, torch, course = commands
    assert torch.endswith(f"--constraint constraints.txt --find-links {folder} torch") and "backend" not in torch
    assert f"--find-links {folder} --editable .[dev]" in course and "--constraint constraints.txt" in course


@pytest.mark.parametrize("folder", ["none", "another version"])
def test_without_a_gpu_or_a_wheel_uv_fetches_the_cpu_build(steps, folder):
    """A wheel of another version does not fit; uv's torch backend is asked."""
    venv, commands, _ = steps
    install.install(venv, nvidia=False, links=wheel_folder(venv, "2.0.0") if folder != "none" else "")
    assert commands[1].endswith("--torch-backend=cpu torch") and "--torch-backend" not in commands[2]


def test_an_unreachable_cpu_build_is_said_and_the_default_taken(steps, capsys):
    """One sentence; the set-up goes on."""
    venv, commands, failing = steps
    failing.append("--torch-backend")
    install.install(venv, nvidia=False, links="")
    assert len(commands) == 3 and "several GB larger" in capsys.readouterr().out


def test_with_a_gpu_the_default_build_is_taken(steps):
    """One step. A CPU wheel in the folder would win over the equal CUDA version, so the folder is left out."""
    venv, commands, _ = steps
    install.install(venv, nvidia=True, links=wheel_folder(venv))
    assert len(commands) == 2 and "--find-links" not in commands[1] and commands[1].endswith("[no links]")


def test_pip_takes_over_where_uv_cannot_be_had(steps, capsys):
    """And says so; pip itself needs no --torch-backend."""
    venv, commands, failing = steps
    failing.append("--quiet")
    install.install(venv, nvidia=False, links="")
    assert "-m pip install" in commands[-1] and "--editable .[dev]" in commands[-1]
    assert "pip does the work" in capsys.readouterr().out and "backend" not in " ".join(commands)


@pytest.mark.parametrize("words", [
    "Failed to establish a new connection: [Errno -2] Name or service not known", "Connection to it timed out.",
    "Cannot connect to proxy: ProxyError", "SSLError: CERTIFICATE_VERIFY_FAILED"])
def test_without_a_network_the_set_up_stops_at_once(steps, words):
    """pip would retry for a minute, then speak of conflicting versions: one sentence instead, and no second try."""
    venv, commands, failing = steps
    failing += ["--quiet", f"pip says {words}"]
    with pytest.raises(LabError, match="No package index can be reached"):
        install.install(venv, nvidia=False, links="")
    assert len(commands) == 1


def test_what_a_command_says_is_kept_and_shown(capfd):
    """The real `run`: its status, and stderr both on the terminal and in the list."""
    said = []
    words = "import sys; print('out'); print('no route', file=sys.stderr); sys.exit(3)"
    assert install.run([sys.executable, "-c", words], said=said) == 3 and said == ["no route\n"]
    shown = capfd.readouterr()
    assert "no route" in shown.err and "out" in shown.out


@pytest.mark.parametrize(("kind", "soabi", "sentence"), [
    (("Windows", "AMD64"), "cp311-win_amd64", "WSL 2"),
    (("Darwin", "x86_64"), "cpython-311-darwin", "Intel"),
    (("Darwin", "arm64", "13.7"), "cpython-311-darwin", "macOS 14"),
    (("Linux", "x86_64"), "cpython-311-x86_64-linux-musl", "musl"),
    (("Linux", "x86_64"), "cpython-311-x86_64-linux-gnu", None),
    (("Linux", "aarch64"), "cpython-311-aarch64-linux-gnu", None),
    (("Darwin", "arm64"), "cpython-311-darwin", None),
])
def test_platforms_without_torch_are_refused_before_anything_is_made(steps, monkeypatch, capsys, kind, soabi, sentence):
    """One sentence, status 1, and no command run; every platform that can work is let through."""
    venv, commands, _ = steps
    monkeypatch.setattr(install.platform, "system", lambda: kind[0])
    monkeypatch.setattr(install.platform, "machine", lambda: kind[1])
    monkeypatch.setattr(install.platform, "mac_ver", lambda: ((kind[2:] or ("14.0",))[0], ("", "", ""), ""))
    monkeypatch.setattr(install.sysconfig, "get_config_var", lambda name: soabi)
    monkeypatch.setattr(install, "make_environment", lambda folder: None)
    monkeypatch.setattr(install, "has_nvidia_gpu", lambda: False)
    status, error = install.main([str(venv)]), capsys.readouterr().err
    if sentence:
        assert (status, commands) == (1, []) and sentence in error and "Traceback" not in error
    else:
        assert status == 0 and error == "" and commands


@pytest.mark.parametrize(("nvidia", "free", "enough"), [(False, 2.4, False), (False, 2.6, True), (True, 5.9, False),
                                                        (True, 6.1, True)])
def test_a_full_disk_is_said_before_the_set_up(monkeypatch, tmp_path, nvidia, free, enough):
    """The CUDA build needs more; the folder need not be there yet, its disk is."""
    asked = []
    usage = shutil.disk_usage(tmp_path)._replace(free=int(free * 1e9))
    monkeypatch.setattr(install.shutil, "disk_usage", lambda path: asked.append(path) or usage)
    if enough:
        install.ask_for_disk(tmp_path / "new" / "venv", nvidia)
    else:
        with pytest.raises(LabError, match=f"{free} GB are free"):
            install.ask_for_disk(tmp_path / "new" / "venv", nvidia)
    assert asked == [tmp_path]


def test_the_first_screen_is_the_welcome_page_rendered(tmp_path):
    """The set-up makes JupyterLab open texts rendered, and ask nothing about news, in its own environment only."""
    install.settle_jupyterlab(tmp_path)
    written = json.loads((tmp_path / "share/jupyter/lab/settings/overrides.json").read_text())
    assert written["@jupyterlab/apputils-extension:notification"]["fetchNews"] == "false"
    assert written["@jupyterlab/docmanager-extension:plugin"]["defaultViewers"] == {"markdown": "Markdown Preview"}
    assert "settle_jupyterlab(folder)" in inspect.getsource(install.main)


def test_a_failing_step_ends_the_set_up_and_the_next_begins_afresh(steps, capsys, monkeypatch):
    """Status 1, the step named, and a mark left behind, since a package may be half there; success removes the mark."""
    venv, _, failing = steps
    made = []
    monkeypatch.setattr(install, "make_environment", made.append)
    monkeypatch.setattr(install, "has_nvidia_gpu", lambda: False)
    failing.append("--editable")
    assert install.main([str(venv)]) == 1 and install.unfinished(venv)
    assert "did not finish" in (error := capsys.readouterr().err) and "--editable" in error and "Traceback" not in error
    failing.clear()
    assert install.main([str(venv)]) == 0 and not install.unfinished(venv) and made == [venv, venv]


def test_an_interrupted_set_up_leaves_its_mark(steps, monkeypatch):
    """Control-C: no traceback, status 130, and the next run starts afresh."""
    venv, _, _ = steps
    monkeypatch.setattr(install, "make_environment", lambda folder: None)
    monkeypatch.setattr(install, "has_nvidia_gpu", lambda: False)
    monkeypatch.setattr(install, "install", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    assert install.main([str(venv)]) == 130 and install.unfinished(venv)


def test_which_environments_are_kept(tmp_path):
    """A whole one stays; one that was broken off, or moved (its scripts name the old place), is made anew."""
    folder, moved = tmp_path / ".venv", tmp_path / "moved"
    subprocess.run([uv(), "venv", "--quiet", "--python", sys.executable, folder], check=True)
    (next(folder.glob("lib/python*")) / "site-packages" / "pip.py").touch()  # stands for pip: only its import is asked
    note = (folder / "pyvenv.cfg").read_text(encoding="utf-8")
    (folder / "pyvenv.cfg").write_text(f"{note}command = python -m venv {folder}\n", encoding="utf-8")
    assert install.is_whole(folder)
    shutil.copytree(folder, moved, symlinks=True)
    assert not install.is_whole(moved)
    (folder / install.UNFINISHED).touch()
    assert not install.is_whole(folder)


def test_a_folder_that_is_no_environment_is_not_deleted(tmp_path):
    """make VENV=~ install must not cost anybody their files."""
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(LabError, match="will not be deleted"):
        install.make_environment(tmp_path)
    assert (tmp_path / "thesis.tex").exists()


# make ------------------------------------------------------------------------------------------------------------


def make(*arguments: str) -> subprocess.CompletedProcess:
    """make, outside any make that may be running these tests."""
    outer = ("MAKEFLAGS", "MFLAGS", "MAKELEVEL", "PYTHON", "VENV")
    clean = {name: value for name, value in os.environ.items() if name not in outer}
    return subprocess.run(["make", *arguments], cwd=REPOSITORY, env=clean, capture_output=True, text=True, timeout=120)


def test_a_python_that_does_not_fit_gets_one_sentence(tmp_path):
    """Too old, or none at all: the sentence names what is needed and how to name another; nothing is created."""
    old = tmp_path / "python3"
    old.write_text("#!/bin/sh\necho noise >&2\nexit 1\n")  # refuses the version question, as Python 2 would
    old.chmod(0o755)
    for choice in (str(old), ""):
        answer = make("install", f"VENV={tmp_path}/venv", f"PYTHON={choice}")
        lines = [line for line in answer.stderr.splitlines() if not line.startswith("make")]
        assert answer.returncode != 0 and len(lines) == 1 and "3.11, 3.12 or 3.13" in lines[0]
        assert not (tmp_path / "venv").exists()


def test_make_lab_sets_up_checks_and_opens(tmp_path):
    """The first run: install, doctor, stamp, JupyterLab on its welcome page, in this order; later only the last."""
    first = make("-n", "lab", f"VENV={tmp_path}/venv").stdout
    order = ("labkit.install", "labkit doctor", "touch", "/lab/tree/WELCOME.md")
    places = [first.index(text) for text in order]
    assert places == sorted(places)
    stamp = re.search(r"touch (\S+)", first)[1]
    (tmp_path / "venv").mkdir()
    Path(stamp).touch()
    later = make("-n", "lab", f"VENV={tmp_path}/venv").stdout
    assert "labkit.install" not in later and "/lab/tree/WELCOME.md" in later


def test_make_test_runs_everything_on_one_thread(tmp_path):
    """Lint, tests, and nbval in lax mode in a process of its own, with the reader's Python and a time limit a cell."""
    plan = make("-n", "test", f"VENV={tmp_path}/venv").stdout.replace("\\\n", " ")
    (notebooks,) = [line for line in plan.splitlines() if "--nbval" in line]
    for word in ("LABKIT_SCALE=quick", "OMP_NUM_THREADS=1", "-p no:python", "--nbval-lax", "--nbval-current-env",
                 "--nbval-cell-timeout 240", "-n 2 --dist loadfile", "LABKIT_WIDGETS=ends"):
        assert word in notebooks
    assert "labkit.course.notebook_lint notebooks/" in plan and "ruff check" in plan
    assert "labkit.course.prose notebooks/" in plan
    assert re.search(r"OMP_NUM_THREADS=1 \S+ -m pytest --timeout 300 -n 2 --dist loadfile tests/", plan)


def test_ci_runs_make_test():
    """The script parses, may be executed, and ends in make test."""
    script = REPOSITORY / ".ci" / "run"
    assert script.stat().st_mode & stat.S_IXUSR and "make test" in script.read_text(encoding="utf-8")
    assert subprocess.run(["bash", "-n", script]).returncode == 0


# papers ----------------------------------------------------------------------------------------------------------


def test_the_readme_tells_what_is_there():
    """Labs in its table are the notebooks that exist, no more and no fewer; the scoreboard has its markers."""
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    here = set(re.findall(r"^\| \[(\d\d_\w+)\]\(notebooks/\1\.ipynb\) \|", readme, re.MULTILINE))
    assert here == {path.stem for path in (REPOSITORY / "notebooks").glob("[0-9][0-9]_*.ipynb")}
    for marker in ("<!-- scoreboard:begin -->", "<!-- scoreboard:end -->"):
        assert readme.count(marker) == 1


def test_the_example_claim_of_the_contributing_guide_is_valid(tmp_path):
    """A contributor copies it, so the reader of claims.toml must accept it as it stands."""
    from labkit.course.claims import load_claims

    guide = (REPOSITORY / "CONTRIBUTING.md").read_text(encoding="utf-8")
    (tmp_path / "claims.toml").write_text(re.search(r"```toml\n(.*?)```", guide, re.DOTALL)[1], encoding="utf-8")
    assert list(load_claims(tmp_path / "claims.toml")) == ["idea.loss"]


def test_files_named_in_the_guides_exist():
    """A path in the README or the guide that leads nowhere wastes a newcomer's time (NN stands for a number)."""
    for guide in ("README.md", "CONTRIBUTING.md"):
        text = (REPOSITORY / guide).read_text(encoding="utf-8")
        for path in re.findall(r"`((?:labkit|data|tests|notebooks)/[\w./]+|[\w.-]+\.(?:txt|toml|md|yml))`", text):
            known = [REPOSITORY / path, REPOSITORY / "labkit" / "course" / path]
            assert "NN" in path or any(place.exists() for place in known), f"{guide} names {path}"
