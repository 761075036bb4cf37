"""Train the base models of data/checkpoints: all of them, or those named.

    python data/build_checkpoints.py                   # all of them, about an hour and a quarter on one core
    python data/build_checkpoints.py sotu-byte-0.1M    # one
    python data/build_checkpoints.py --table           # the tables in SOURCES.md, from the manifest

Two families, with seed 0: decoders of English, trained on the training split of the State of the Union addresses
(recipes in labkit/trainers/bases.py), and decoders of the small worlds, trained on problems of their training side
(labkit/trainers/world_bases.py, sum_bases.py, hint_bases.py). Each is rounded to bfloat16 (half the size; what is
measured is the rounded model) and written with its sha256 into manifest.json. An interrupted training goes on where it
stopped.
"""

import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from labkit.allocator import keep_freed_memory
from labkit.data import load_corpus, load_tokenizer, tokens_of
from labkit.data.corpora import read_manifest
from labkit.errors import LabError
from labkit.files import REPOSITORY, sha256, write_json
from labkit.models import GPT, GPTConfig
from labkit.trainers import GRPOSettings, History, TrainSettings, grpo, imitate, pretrain
from labkit.trainers.bases import BASES, FOLDER, bits_per_byte_of, recipe
from labkit.trainers.checkpoint import load_model, save_model
from labkit.trainers.rollout import accuracy
from labkit.trainers.world_bases import WORLD_BASES, world_recipe

EVERY_BASE = (*BASES, *WORLD_BASES)
EVALUATED = {"sotu": "held_out", "web-bible": "held_out"}


def build(name: str) -> dict:
    """Train one base model, write it, and return its entry of the manifest."""
    return build_world(name) if name in WORLD_BASES else build_text(name)


def build_text(name: str) -> dict:
    """A base of English: next tokens of the State of the Union addresses."""
    config, tokenizer_name, settings = recipe(name)
    tokenizer = load_tokenizer(tokenizer_name)
    text_M = tokens_of("sotu", tokenizer)
    entry = trained(name, config, settings, {"tokenizer": tokenizer_name},
                    lambda model, path: pretrain(model, text_M, settings, checkpoint=path, label=name))
    tokens = settings.steps * settings.batch * settings.context
    return {**entry, "steps": settings.steps, "tokens": tokens,
            "bits_per_byte": measure(FOLDER / entry["file"], tokenizer)}


def build_world(name: str) -> dict:
    """A base of small worlds: solutions in a mixture of dialects, and rewards where its recipe has them."""
    made = world_recipe(name)

    def run(model: GPT, path: Path) -> History:
        for number, (subject, settings) in enumerate(made.stages):
            train = grpo if isinstance(settings, GRPOSettings) else imitate
            history = train(model, subject, settings, checkpoint=path.with_suffix(f".{number}.safetensors"), label=name)
        return history

    entry = trained(name, made.config, made.stages[0][1], {}, run)
    model = load_model(FOLDER / entry["file"])
    return {**entry, "examples": made.examples,
            "accuracy": {key: round(accuracy(model, world, problems=4000), 3) for key, world in made.worlds.items()}}


def trained(name: str, config: GPTConfig, settings: TrainSettings, notes: dict[str, str],
            run: Callable[[GPT, Path], History]) -> dict:
    """Train a fresh model by `run`, which is told where to keep what is unfinished; write the model."""
    model, path = GPT(config, seed=settings.seed), FOLDER / f"{name}.safetensors"
    unfinished = REPOSITORY / ".labkit" / f"{name}.unfinished.safetensors"
    start = time.perf_counter()
    history = run(model, unfinished)
    command = f"python data/build_checkpoints.py {name}"
    save_model(path, model.bfloat16(), command=command, seed=str(settings.seed), **notes)
    for part in unfinished.parent.glob(f"{name}.unfinished*"):
        part.unlink()
    return {"name": name, "file": path.name, "sha256": sha256(path), "bytes": path.stat().st_size, "command": command,
            "seed": settings.seed, **notes, "parameters": model.count_parameters(),
            "training_loss": round(sum(history.train["loss"][-50:]) / 50, 4),
            "seconds": round(time.perf_counter() - start)}


def measure(path: Path, tokenizer) -> dict[str, float]:
    """Bits per byte of the shipped file on the held-out documents of both corpora."""
    model, result = load_model(path), {}
    for corpus, split in EVALUATED.items():
        documents = load_corpus(corpus).split()[1]
        text_bytes = sum(len(document.text.encode("utf-8")) for document in documents)
        result[corpus] = round(bits_per_byte_of(model, tokens_of(corpus, tokenizer, split), text_bytes), 4)
    return result


def table(manifest: dict) -> str:
    """The manifest as two Markdown tables."""
    rows = ["| name | parameters | tokens seen | bits per byte: held-out SOTU | World English Bible | kB |",
            "|---|---|---|---|---|---|"]
    for name in BASES:
        if name in manifest:
            entry = manifest[name]
            rows.append(f"| `{name}` | {entry['parameters']:,} | {entry['tokens'] / 1e6:.1f}M | "
                        f"{entry['bits_per_byte']['sotu']:.3f} | {entry['bits_per_byte']['web-bible']:.3f} | "
                        f"{entry['bytes'] / 1000:.0f} |")
    rows += ["", "| name | parameters | lessons | right answers on the test side, sampled | kB |",
             "|---|---|---|---|---|"]
    for name in WORLD_BASES:
        if name in manifest:
            entry = manifest[name]
            right = ", ".join(f"{world} {share:.2f}" for world, share in entry["accuracy"].items())
            rows.append(f"| `{name}` | {entry['parameters']:,} | {entry['examples'] / 1e3:.0f}k | {right} | "
                        f"{entry['bytes'] / 1000:.0f} |")
    return "\n".join(rows)


def written() -> dict:
    """The manifest as it stands on disk."""
    return read_manifest(FOLDER) if (FOLDER / "manifest.json").exists() else {}


def main(arguments: list[str]) -> None:
    """Build what is asked for, and write the manifest after each model."""
    if arguments != ["--table"]:
        torch.set_num_threads(1)
        keep_freed_memory()
        for name in arguments or EVERY_BASE:
            entry = build(name)
            manifest = written() | {name: entry}  # read again: another process may have added to it
            write_json(FOLDER / "manifest.json", [manifest[base] for base in EVERY_BASE if base in manifest])
    print(table(written()))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except LabError as error:
        sys.exit(str(error))
