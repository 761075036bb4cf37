"""The shipped corpora are what SOURCES.md says, and a missing or altered file is refused with the command that mends
it."""

import gzip
import json
import re
import shutil
from pathlib import Path

import pytest

from labkit.data import CORPORA, Corpus, Document, load_corpus
from labkit.data.corpora import FOLDER, read_manifest
from labkit.data.tokenizers import FOLDER as TOKENIZERS
from labkit.data.tokenizers import SHIPPED
from labkit.errors import LabError
from labkit.files import DATA, sha256


@pytest.mark.parametrize("name", CORPORA)
def test_shipped_corpus_loads_and_has_the_recorded_documents(name):
    """Loading checks the sha256; the count and texts show that the reader took every line."""
    corpus, entry = load_corpus(name), read_manifest()[name]
    assert len(corpus.documents) == entry["documents"] > 30
    assert all(document.text.strip() for document in corpus.documents)
    assert corpus.sha256 == entry["sha256"] and (FOLDER / entry["file"]).stat().st_size == entry["bytes"]


def test_contents_are_what_the_course_expects():
    """One known fact for each corpus: a swapped file or a wrong key would break it."""
    sotu = load_corpus("sotu").documents
    assert (sotu[0].meta["year"], sotu[0].meta["name"], sotu[-1].meta["year"]) == (1790, "George Washington", 2021)
    bible = load_corpus("web-bible").documents
    assert bible[0].text.startswith("In the beginning God created")
    assert bible[-1].meta == {"book": "Revelation", "chapter": 22}
    assert not any("`" in document.text or "  " in document.text for document in bible)
    psalms = [document for document in bible if document.meta["book"] == "Psalms"]
    assert all(f"Psalm {document.meta['chapter']}" in document.text[:25] for document in psalms) and len(psalms) == 150
    articles = load_corpus("udhr")
    assert articles.language("de").documents[1].text.startswith("Alle Menschen sind frei")
    assert len(articles.documents) == 31 and len(articles.documents[0].meta) == 1 + 24


@pytest.mark.parametrize("name", ["gnome-help-9lang", "gnome-help-10script", "udhr"])
def test_parallel_corpora_are_aligned_and_reject_an_unknown_language(name):
    """Each language gives as many documents as English, with the same ids; a wrong code is named with the right
    ones."""
    corpus = load_corpus(name)
    german = corpus.language("de")
    assert len(german.documents) == len(corpus.documents) and german.sha256 != corpus.sha256
    assert german.documents[5].text == corpus.documents[5].meta["de"] != corpus.documents[5].text
    with pytest.raises(LabError, match=r"no language 'xx'.*It has: .*de"):
        corpus.language("xx")


def damage(kind: str, path: Path) -> None:
    packed = path.read_bytes()
    if kind == "missing":
        path.unlink()
    elif kind == "truncated":
        path.write_bytes(packed[: len(packed) // 2])
    elif kind == "empty":
        path.write_bytes(b"")
    else:
        path.write_bytes(packed[:1000] + bytes([packed[1000] ^ 1]) + packed[1001:])


@pytest.mark.parametrize("kind", ["missing", "truncated", "flipped", "empty"])
def test_damaged_corpus_gives_one_clear_sentence(kind, tmp_path):
    """Every damage, down to one bit, is a LabError that names file, git command and build command; never a zlib
    error."""
    shutil.copytree(FOLDER, tmp_path / "corpora")
    damage(kind, tmp_path / "corpora" / "udhr.jsonl.gz")
    with pytest.raises(LabError) as caught:
        load_corpus("udhr", tmp_path / "corpora")
    assert "udhr.jsonl.gz" in caught.value.problem
    assert "git checkout -- data/corpora/udhr.jsonl.gz" in caught.value.fix
    assert "python data/build.py udhr" in caught.value.fix
    assert load_corpus("gnome-help-10script", tmp_path / "corpora").documents, "another file's damage must not matter"


@pytest.mark.parametrize("text", [None, "", "{", '[{"file": 1}]', "3", "[]", '[{"name": "sotu"}]'])
def test_damaged_manifest_gives_one_clear_sentence(text, tmp_path):
    """A manifest that is missing, empty, cut, or of another shape is a LabError with its fix."""
    if text is not None:
        (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(LabError, match="git checkout"):
        load_corpus("sotu", tmp_path)


def test_unknown_name_lists_the_known_ones():
    """A misspelt name is answered with the names there are."""
    with pytest.raises(LabError, match="sotu, web-bible"):
        load_corpus("stou")


def test_split_is_deterministic_disjoint_and_complete():
    """Every document lies on exactly one side, in corpus order; the same seed gives the same sides, another seed
    others."""
    corpus = load_corpus("sotu")
    train, held_out = corpus.split()
    assert len(held_out) == round(0.05 * 233) and len(train) + len(held_out) == 233
    years = [document.meta["year"] for document in held_out]
    assert years == sorted(years) == [document.meta["year"] for document in load_corpus("sotu").split()[1]]
    assert {id(document) for document in train}.isdisjoint(id(document) for document in held_out)
    assert years != [document.meta["year"] for document in corpus.split(seed=1)[1]]


def test_split_keeps_pages_together():
    """A help page whose paragraphs stood on both sides would leak its wording into the held-out text."""
    train, held_out = load_corpus("gnome-help-9lang").split()
    assert held_out and not {d.meta["page"] for d in train} & {d.meta["page"] for d in held_out}


@pytest.mark.parametrize(("count", "held_out"), [(1, 0.05), (10, 0.0), (10, 1.0)])
def test_split_without_two_sides_is_refused(count, held_out):
    """A side without documents would give an evaluation on nothing."""
    with pytest.raises(LabError, match="hold out"):
        Corpus("small", [Document(str(i)) for i in range(count)], "0").split(held_out=held_out)


def test_line_separators_inside_a_text_do_not_end_it(tmp_path):
    """U+2028 and U+0085 end a line for str.splitlines but not in JSON lines: a text that holds them stays one
    document."""
    text = "one\u2028two\u0085three\x1cfour"
    path = tmp_path / "udhr.jsonl.gz"
    path.write_bytes(gzip.compress(json.dumps({"text": text}, ensure_ascii=False).encode() + b"\n", mtime=0))
    manifest = [{"name": "udhr", "file": path.name, "sha256": sha256(path)}]
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    assert [document.text for document in load_corpus("udhr", tmp_path).documents] == [text]


def test_sources_page_states_every_file_with_its_hashes():
    """SOURCES.md and the manifests must agree on names, both sha256, sizes and licences; every shipped file has a
    row."""
    page = (DATA / "SOURCES.md").read_text(encoding="utf-8")
    entries = [*read_manifest().values(), *read_manifest(TOKENIZERS).values()]
    assert [entry["name"] for entry in entries] == [*CORPORA, *SHIPPED]
    for entry in entries:
        row = next(line for line in page.splitlines() if f"`{entry['file']}`" in line and line.startswith("|"))
        facts = [entry[key] for key in ("sha256", "licence", "origin", "package_sha256") if key in entry]
        assert all(fact in row for fact in [*facts, f"{entry['bytes']:,}"]), entry["name"]
    shipped = {str(path.relative_to(FOLDER)) for path in FOLDER.rglob("*.gz")}
    assert shipped == {entry["file"] for entry in read_manifest().values()}


def test_share_alike_files_lie_apart_with_licence_and_credits():
    """CC BY-SA asks for its text and for the authors' names; its files must not mix with the free ones."""
    for entry in read_manifest().values():
        assert entry["file"].startswith("cc-by-sa/") == ("BY-SA" in entry["licence"])
    assert "Attribution-ShareAlike 3.0" in (FOLDER / "cc-by-sa/LICENSE.txt").read_text(encoding="utf-8")
    credits = (FOLDER / "cc-by-sa/CREDITS.txt").read_text(encoding="utf-8")
    assert "Shaun McCance" in credits and len(re.findall(r"^\w+: \S", credits, re.M)) == 14


def test_packed_files_carry_no_time_stamp():
    """A time stamp in the gzip header (bytes 4 to 7) would make each build another file."""
    assert all(path.read_bytes()[4:8] == bytes(4) for path in FOLDER.rglob("*.gz"))
