"""Train the base models of data/checkpoints: all of them, or those named.

    python data/build_checkpoints.py                   # all six, about an hour on one core
    python data/build_checkpoints.py sotu-byte-0.1M    # one
    python data/build_checkpoints.py --table           # the table in SOURCES.md, from the manifest

Each is trained on the training split of the State of the Union addresses by the recipe in labkit/trainers/bases.py with
seed 0, rounded to bfloat16 (half the size; the bits per byte are those of the rounded model), and written with its
sha256 into manifest.json. An interrupted training goes on where it stopped.
"""

import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from labkit.allocator import keep_freed_memory
from labkit.data import load_corpus, load_tokenizer, tokens_of
from labkit.data.corpora import read_manifest
from labkit.errors import LabError
from labkit.files import REPOSITORY, sha256, write_json
from labkit.models import GPT
from labkit.trainers import pretrain
from labkit.trainers.bases import BASES, FOLDER, bits_per_byte_of, recipe
from labkit.trainers.checkpoint import load_model, save_model

EVALUATED = {"sotu": "held_out", "web-bible": "held_out"}


def build(name: str) -> dict:
    """Train one base model, write it, and return its entry of the manifest."""
    config, tokenizer_name, settings = recipe(name)
    tokenizer = load_tokenizer(tokenizer_name)
    model, path = GPT(config, seed=settings.seed), FOLDER / f"{name}.safetensors"
    unfinished = REPOSITORY / ".labkit" / f"{name}.unfinished.safetensors"
    start = time.perf_counter()
    history = pretrain(model, tokens_of("sotu", tokenizer), settings, checkpoint=unfinished, label=name)
    command = f"python data/build_checkpoints.py {name}"
    save_model(path, model.bfloat16(), command=command, seed=str(settings.seed), tokenizer=tokenizer_name)
    unfinished.unlink(missing_ok=True)
    return {"name": name, "file": path.name, "sha256": sha256(path), "bytes": path.stat().st_size, "command": command,
            "seed": settings.seed, "tokenizer": tokenizer_name, "parameters": model.count_parameters(),
            "steps": settings.steps, "tokens": settings.steps * settings.batch * settings.context,
            "training_loss": round(sum(history.train["loss"][-50:]) / 50, 4),
            "seconds": round(time.perf_counter() - start), "bits_per_byte": measure(path, tokenizer)}


def measure(path: Path, tokenizer) -> dict[str, float]:
    """Bits per byte of the shipped file on the held-out documents of both corpora."""
    model, result = load_model(path), {}
    for corpus, split in EVALUATED.items():
        documents = load_corpus(corpus).split()[1]
        text_bytes = sum(len(document.text.encode("utf-8")) for document in documents)
        result[corpus] = round(bits_per_byte_of(model, tokens_of(corpus, tokenizer, split), text_bytes), 4)
    return result


def table(manifest: dict) -> str:
    """The manifest as a Markdown table."""
    rows = ["| name | parameters | tokens seen | bits per byte: held-out SOTU | World English Bible | kB |",
            "|---|---|---|---|---|---|"]
    for name in BASES:
        if name in manifest:
            entry = manifest[name]
            rows.append(f"| `{name}` | {entry['parameters']:,} | {entry['tokens'] / 1e6:.1f}M | "
                        f"{entry['bits_per_byte']['sotu']:.3f} | {entry['bits_per_byte']['web-bible']:.3f} | "
                        f"{entry['bytes'] / 1000:.0f} |")
    return "\n".join(rows)


def main(arguments: list[str]) -> None:
    """Build what is asked for, and write the manifest after each model."""
    path = FOLDER / "manifest.json"
    manifest = read_manifest(FOLDER) if path.exists() else {}
    if arguments != ["--table"]:
        torch.set_num_threads(1)
        keep_freed_memory()
        for name in arguments or BASES:
            manifest[name] = build(name)
            write_json(path, [manifest[base] for base in BASES if base in manifest])
    print(table(manifest))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except LabError as error:
        sys.exit(str(error))
