"""Large corpora for the workstation scale: optional, fetched or built on the spot, never shipped.

Two ways in. `hub_corpus` streams a data set of the Hugging Face hub (install labkit's extra: pip install -e '.[hf]').
`debian_source_corpus` takes the source of the Linux kernel from Debian's package linux-source-6.1 (GPL-2): 93 MB of C
in the default folders, or 24 MB of English technical prose in "Documentation" as .rst. Both keep one packed file in
`folder`, which can be copied to a machine without a network; a second call reads that file. Neither the text nor a
model trained on it is part of the repository.
"""

import hashlib
import json
import lzma
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from labkit.data.corpora import Corpus, Document
from labkit.data.tokenizers import BPETokenizer
from labkit.errors import LabError
from labkit.files import REPOSITORY, sha256, whole_file
from labkit.progress import bar

FOLDER = REPOSITORY / ".labkit" / "corpora"
KERNEL = ("kernel", "mm", "fs", "net", "lib", "block", "ipc", "crypto")


def hub_corpus(dataset: str, *, subset: str | None = None, split: str = "train", column: str = "text",
               megabytes: float = 500.0, folder: Path = FOLDER) -> Corpus:
    """The first `megabytes` of UTF-8 text of a hub data set, streamed: one document for each row's `column`.

    Raises LabError without the `datasets` library, for a size of zero, and where the hub or the column can't be read.
    """
    if megabytes <= 0:
        raise LabError(f"{megabytes} MB is no text.", "Ask for more than 0 megabytes.")
    key = hashlib.sha256(f"{dataset} {subset} {split} {column} {megabytes}".encode()).hexdigest()[:12]
    path = Path(folder) / f"hub-{dataset.replace('/', '--')}-{key}.jsonl.xz"
    if not path.is_file():
        rows = _hub_rows(dataset, subset, split)
        _pack(path, _first_bytes(rows, dataset, column, int(megabytes * 1e6)))
    return _unpack(path, f"hub/{dataset}")


def debian_source_corpus(folder: Path = FOLDER, *, folders: Sequence[str] = KERNEL, suffix: str = ".c",
                         package: str = "linux-source-6.1") -> Corpus:
    """Files of a Debian source package as documents, in the order of their paths; `meta` holds the path.

    `folders` are top folders of the source tree, `suffix` is ".c" or ".rst" (with folders=("Documentation",)). The
    first call downloads 139 MB with apt-get, takes about a minute, and leaves one file of about 20 MB in `folder`.
    Raises LabError where apt-get is missing or fails, and where no file matches.
    """
    if not folders or not suffix.startswith("."):
        raise LabError(f"Nothing to take: folders {tuple(folders)}, suffix {suffix!r}.",
                       "Name at least one folder, and a suffix like '.c' or '.rst'.")
    key = hashlib.sha256(f"{package} {sorted(folders)} {suffix}".encode()).hexdigest()[:12]
    path = Path(folder) / f"debian-{package}-{key}.jsonl.xz"
    if not path.is_file():
        with tempfile.TemporaryDirectory() as work:
            _pack(path, _source_rows(_source_archive(package, Path(work)), set(folders), suffix))
    return _unpack(path, f"debian/{package}")


def large_tokenizer(corpus: Corpus, vocab_size: int = 16384, *, megabytes: float = 30.0) -> BPETokenizer:
    """A BPE trained on about `megabytes` of the corpus's training documents, taken at even distances."""
    train, _ = corpus.split()
    total = sum(len(document.text) for document in train)
    step = max(1, round(total / (megabytes * 1e6)))
    texts = [document.text for document in train[::step]]
    return BPETokenizer.train(texts, vocab_size, f"{corpus.name}-bpe-{vocab_size}")


def _hub_rows(dataset: str, subset: str | None, split: str) -> Iterable[dict]:
    try:
        from datasets import load_dataset
    except ImportError:
        raise LabError("The hub loader needs the library `datasets`.", "Install it: pip install -e '.[hf]'") from None
    try:
        return load_dataset(dataset, subset, split=split, streaming=True)
    except Exception as error:  # dozens of kinds: no network, no such data set, no such split
        raise LabError(f"The data set {dataset} can't be opened: {error}.",
                       "Check its name, subset and split, and the network; or use debian_source_corpus.") from None


def _first_bytes(rows: Iterable[dict], dataset: str, column: str, limit: int) -> Iterator[dict]:
    with bar(limit, dataset, "B") as progress:
        taken = 0
        for row in rows:
            if not isinstance(row.get(column), str):
                raise LabError(f"{dataset} has no text in a column {column!r}.", f"Its columns: {', '.join(row)}.")
            size = len(row[column].encode("utf-8"))
            taken += size
            progress.update(size)
            yield {"text": row[column]}
            if taken >= limit:
                return


def _source_archive(package: str, work: Path) -> Path:
    """Download `package` and unpack it in `work`: the path of the source archive that it holds."""
    if not (shutil.which("apt-get") and shutil.which("dpkg-deb")):
        raise LabError("This loader needs apt-get and dpkg-deb, which only Debian and its relatives have.",
                       "Use hub_corpus, or copy the packed file from a machine that has them.")
    with bar(2, f"fetching {package}", "step") as progress:
        fetched = subprocess.run(["apt-get", "download", package], cwd=work, capture_output=True, text=True)
        if fetched.returncode:
            last = (fetched.stderr.strip().splitlines() or ["no message"])[-1]
            raise LabError(f"apt-get could not download {package}: {last}", "Try `apt-get update`, or another package.")
        progress.update()
        subprocess.run(["dpkg-deb", "-x", next(work.glob("*.deb")), work / "unpacked"], check=True)
        progress.update()
    archives = list((work / "unpacked/usr/src").glob("*.tar.*"))
    if not archives:
        raise LabError(f"{package} holds no source archive in /usr/src.", "Name a package like linux-source-6.1.")
    return archives[0]


def _source_rows(archive: Path, folders: set[str], suffix: str) -> Iterator[dict]:
    rows = {}
    with tarfile.open(archive) as source, bar(0, "reading the source", "file") as progress:
        for member in source:
            progress.update()
            path = member.name.partition("/")[2]
            if member.isfile() and path.endswith(suffix) and path.split("/")[0] in folders:
                rows[path] = source.extractfile(member).read().decode("utf-8", errors="replace")
    if not rows:
        raise LabError(f"No *{suffix} file lies under {', '.join(sorted(folders))}.", "Check folders and suffix.")
    for path in sorted(rows):
        yield {"path": path, "text": rows[path]}


def _pack(path: Path, rows: Iterator[dict]) -> None:
    with whole_file(path) as temporary, lzma.open(temporary, "wt", preset=2, encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def _unpack(path: Path, name: str) -> Corpus:
    try:
        with lzma.open(path) as file:
            rows = [json.loads(line) for line in file]
    except (lzma.LZMAError, EOFError, ValueError):
        raise LabError(f"The file {path} is damaged.", "Delete it and run again: it will be made anew.") from None
    return Corpus(name, [Document(row.pop("text"), row) for row in rows], sha256(path))
