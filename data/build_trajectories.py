"""Make data/trajectories: 300 generated agent traces, a tokenizer, and two small models.

    python data/build_trajectories.py              # everything, about a quarter of an hour on one core
    python data/build_trajectories.py generated    # only this: generated, trace-tokenizer, trace-base, trace-student

The rows are rollouts of the scripted agent (labkit.tasks.ScriptedPolicy) in the sandbox: four attempts at one issue in
each of 75 made-up repositories. Wall times differ from run to run, and so does `duration_sec`; everything else is a
function of the seeds. The student learns from other repositories: none of those in the rows. Needs Linux with user
namespaces, and git.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from labkit.allocator import keep_freed_memory
from labkit.data import BPETokenizer, load_trajectories, write_trajectories
from labkit.data.corpora import read_manifest
from labkit.data.trajectories import FOLDER
from labkit.errors import LabError
from labkit.files import sha256, write_json
from labkit.models import GPT
from labkit.tasks import ScriptedPolicy, make_tasks, rollouts, split_repositories
from labkit.trainers.chat_tuning import cut_chats, tune_on_chats
from labkit.trainers.checkpoint import save_model
from labkit.trainers.trace_models import (
    BASE_SETTINGS,
    CONTEXT,
    STUDENT_SETTINGS,
    VOCABULARY,
    load_trace_model,
    short_messages,
    trace_config,
    trace_tokenizer,
    train_base,
)

FILES = {"generated": "generated.parquet", "trace-tokenizer": "trace-tokenizer.json",
         "trace-base": "trace-base.safetensors", "trace-student": "trace-student.safetensors"}
SHIPPED = {"repositories": 75, "attempts": 4, "first_seed": 0}
LESSONS = {"repositories": 250, "attempts": 4, "first_seed": 100}  # of the student alone


def attempts(repositories: int, attempts: int, first_seed: int):
    """Rollouts of the script: `attempts` at one issue in each repository."""
    with tempfile.TemporaryDirectory() as folder:
        tasks = make_tasks(repositories, Path(folder), first_seed=first_seed)
        return rollouts([task for task in tasks for _ in range(attempts)], ScriptedPolicy(), policy_seed=first_seed)


def make_generated(path: Path) -> dict:
    """The shipped rows."""
    done = attempts(**SHIPPED)
    rows = write_trajectories(path, [each.row for each in done])
    return {"rows": rows, "submitted": sum(each.submitted for each in done),
            "correct": sum(each.correct for each in done),
            "submitted_and_correct": sum(each.correct and each.submitted for each in done)}


def make_tokenizer(path: Path) -> dict:
    """Byte-level BPE on the short form of the shipped rows that the labs train on."""
    rows = [row for batch in load_trajectories("shipped") for row in batch.to_pylist()]
    train, _ = split_repositories({row["repo"] for row in rows})
    texts = [part["content"] for row in rows if row["repo"] in train for part in short_messages(row)]
    BPETokenizer.train(texts, VOCABULARY, path.stem).save(path)
    return {"vocabulary": VOCABULARY}


def make_base(path: Path) -> dict:
    """The base: text about repositories."""
    chat = trace_tokenizer()
    model = GPT(trace_config(chat))
    history = train_base(model, chat)
    return saved(path, model, history, BASE_SETTINGS.steps)


def make_student(path: Path) -> dict:
    """The student: the base, tuned on the assistant's turns of rollouts in repositories of its own."""
    chat, model = trace_tokenizer(), load_trace_model("trace-base")
    lessons = [chat.encode(short_messages(each.row)) for each in attempts(**LESSONS)]
    history = tune_on_chats(model, cut_chats(lessons, CONTEXT), STUDENT_SETTINGS, label="trace-student")
    return saved(path, model, history, STUDENT_SETTINGS.steps)


def saved(path: Path, model: GPT, history, steps: int) -> dict:
    """Write a model in bfloat16; what the manifest says of its training."""
    save_model(path, model.bfloat16(), command=f"python data/build_trajectories.py {path.stem}")
    return {"parameters": model.count_parameters(), "steps": steps,
            "training_loss": round(sum(history.train["loss"][-50:]) / 50, 4)}


MAKE = {"generated": make_generated, "trace-tokenizer": make_tokenizer, "trace-base": make_base,
        "trace-student": make_student}


def build(name: str) -> dict:
    """Make one file and put its entry into the manifest."""
    path, start = FOLDER / FILES[name], time.perf_counter()
    facts = MAKE[name](path)
    entry = {"name": name, "file": path.name, "sha256": sha256(path), "bytes": path.stat().st_size,
             "licence": "CC0-1.0", "origin": "made by the course's own code",
             "command": f"python data/build_trajectories.py {name}", **facts,
             "seconds": round(time.perf_counter() - start)}
    manifest = FOLDER / "manifest.json"
    kept = (read_manifest(FOLDER) if manifest.is_file() else {}) | {name: entry}
    write_json(manifest, [kept[key] for key in FILES if key in kept])
    return entry


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"any of: {', '.join(FILES)}")
    names = parser.parse_args().names or list(FILES)
    if unknown := set(names) - set(FILES):
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    keep_freed_memory()
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name in names:
        print(build(name), flush=True)


if __name__ == "__main__":
    try:
        main()
    except LabError as error:
        sys.exit(str(error))
