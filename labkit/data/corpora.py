"""The corpora shipped with the course: what they are, how they are read, and how an altered file is noticed.

Each corpus is one gzip file of JSON lines under data/corpora, made by data/build.py from a package.
data/corpora/manifest.json holds its sha256; a file whose bytes differ is refused, because a result measured on
other text is another result. Origins and licences: data/SOURCES.md.
"""

import gzip
import hashlib
import json
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from labkit.errors import LabError
from labkit.files import DATA, sha256

CORPORA = ("sotu", "web-bible", "gnome-help-9lang", "gnome-help-10script", "udhr")
FOLDER = DATA / "corpora"


@dataclass(frozen=True)
class Document:
    """One text and what is known about it. In a parallel corpus `meta` also holds each language under its code."""

    text: str
    meta: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Corpus:
    """Documents in a fixed order. `sha256` identifies their content and is part of every cache key."""

    name: str
    documents: list[Document]
    sha256: str

    def split(self, seed: int = 0, held_out: float = 0.05) -> tuple[list[Document], list[Document]]:
        """Training and held-out documents: a pure function of (seed, held_out); both keep the corpus order.

        Documents of one page (`meta["page"]`, in the help texts) stay on one side, so that no page is in both.
        At least one page or document lies on each side.
        """
        groups = [document.meta.get("page", index) for index, document in enumerate(self.documents)]
        names = list(dict.fromkeys(groups))
        if len(names) < 2 or not 0 < held_out < 1:
            raise LabError(
                f"Corpus {self.name} with {len(names)} documents can't hold out a fraction of {held_out}.",
                "Use two documents or more, and a fraction between 0 and 1, like 0.05.",
            )
        count = min(max(round(held_out * len(names)), 1), len(names) - 1)
        order = np.random.default_rng(seed).permutation(len(names))
        chosen = {names[index] for index in order[:count]}
        sides = ([], [])
        for document, group in zip(self.documents, groups, strict=True):
            sides[group in chosen].append(document)
        return sides

    def language(self, code: str) -> "Corpus":
        """A parallel corpus with `code`'s translation as the text of every document (same order, so rows align)."""
        if any(code not in document.meta for document in self.documents):
            known = sorted(key for key, value in self.documents[0].meta.items() if isinstance(value, str))
            raise LabError(f"Corpus {self.name} has no language {code!r}.", f"It has: {', '.join(known)}.")
        documents = [replace(document, text=document.meta[code]) for document in self.documents]
        return Corpus(f"{self.name}/{code}", documents, f"{self.sha256}/{code}")


def load_corpus(name: str, folder: Path = FOLDER) -> Corpus:
    """Read a shipped corpus after checking its sha256.

    Raises LabError for an unknown name, and for a missing or altered file, with the command that mends it.
    """
    if name not in CORPORA:
        raise LabError(f"There is no corpus {name!r}.", f"The corpora are: {', '.join(CORPORA)}.")
    packed = checked_file(name, folder).read_bytes()
    lines = gzip.decompress(packed).splitlines()  # of bytes: str.splitlines would also break at U+2028
    return Corpus(name, [_document(json.loads(line)) for line in lines], hashlib.sha256(packed).hexdigest())


def translations(corpus: Corpus) -> list[str]:
    """Codes of the languages of a parallel corpus, in the file's order: English, the original, comes first."""
    return [key for key, value in corpus.documents[0].meta.items() if isinstance(value, str) and key != "page"]


def parity(corpus: Corpus, code: str) -> float:
    """UTF-8 bytes of a language over those of the English original, in documents that have both (arXiv 2605.01188)."""
    both = [(document.meta[code], document.meta["en"]) for document in corpus.documents if document.meta[code]]
    return sum(len(own.encode()) for own, _ in both) / sum(len(english.encode()) for _, english in both)


def read_manifest(folder: Path = FOLDER) -> dict[str, dict]:
    """The manifest's entries by name; each has at least name, file, sha256, bytes, licence and origin."""
    path = folder / "manifest.json"
    try:
        return {entry["name"]: entry for entry in json.loads(path.read_text(encoding="utf-8"))}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LabError(f"The list of files, {path}, can't be read ({type(error).__name__}).",
                       f"Restore it: git checkout -- data/{folder.name}/manifest.json") from None


def checked_file(name: str, folder: Path) -> Path:
    """The path of a shipped file after its sha256 was compared with the manifest's; LabError where they differ."""
    entry = read_manifest(folder).get(name, {})
    path = folder / entry.get("file", name)
    state = "is missing" if not path.is_file() else "was altered" if sha256(path) != entry.get("sha256") else ""
    if state:
        fix = f"git checkout -- data/{folder.name}" + (f"/{entry['file']}" if "file" in entry else "")
        remake = entry.get("command", f"python data/build.py {name}")
        raise LabError(f"The file {path} {state}.", f"Restore it: {fix}   or: {remake}")
    return path


def _document(row: dict) -> Document:
    text = row.pop("text", None)
    return Document(row["en"] if text is None else text, row)
