"""The corpus of the study: which files it has, and that equal texts count once."""

import gzip
import json
from pathlib import Path

import pytest

from benchmarks.sparse_vs_dense.corpus import SMALLEST, Place, account_of, describe, list_files, places, write_corpus


def text(word: str) -> str:
    return (word + "\n") * SMALLEST


@pytest.fixture
def tree(tmp_path: Path) -> list[Place]:
    """Two places with a duplicate within and one across them."""
    files = {
        "one/a.py": text("a"),
        "one/test/b.py": text("b"),
        "one/copy_of_a.txt": text("a"),
        "one/site-packages/c.py": text("c"),
        "one/__pycache__/d.py": text("d"),
        "one/short.py": "pass\n",
        "one/data.json": text("e"),
        "two/LICENSE": text("f"),
        "two/readme.md": text("b"),
    }
    for name, content in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    (tmp_path / "two/changelog.Debian.gz").write_bytes(gzip.compress(text("g").encode()))
    (tmp_path / "two/broken.txt.gz").write_bytes(b"\x1f\x8bnothing")
    (tmp_path / "two/latin.txt").write_bytes(text("\xe9").encode("latin-1"))
    (tmp_path / "two/link.txt").symlink_to(tmp_path / "two/LICENSE")
    without = ("__pycache__", "site-packages")
    return [Place("one", tmp_path / "one", without=without), Place("two", tmp_path / "two", (".txt", ".md"))]


def rows(path: Path) -> list[dict[str, str]]:
    with gzip.open(path, "rt") as file:
        return [json.loads(line) for line in file]


def test_equal_texts_count_once(tree: list[Place], tmp_path: Path) -> None:
    account = write_corpus(tmp_path / "c.jsonl.gz", tree, 10**6)
    written = rows(tmp_path / "c.jsonl.gz")
    assert sorted(row["text"] for row in written) == [text(word) for word in "abfg"]
    assert account["duplicates"] == 2 and account["unusable"] == 3  # short.py, broken, latin
    assert sum(of["files"] for of in account["places"].values()) == 4
    assert account["bytes"] == 4 * len(text("a")) == sum(of["bytes"] for of in account["places"].values())
    assert json.loads(account_of(tmp_path / "c.jsonl.gz").read_text()) == account
    assert f"{account['bytes'] / 1e6:.1f} MB" in describe(account) and "2 duplicates" in describe(account)


def test_order_is_stable_and_a_smaller_corpus_is_the_beginning(tree: list[Place], tmp_path: Path) -> None:
    first, again, small = (tmp_path / f"{name}.jsonl.gz" for name in ("first", "again", "small"))
    write_corpus(first, tree, 10**6)
    write_corpus(again, tree[::-1], 10**6)
    assert first.read_bytes() == again.read_bytes()
    write_corpus(small, tree, 2 * len(text("a")) + 5)
    assert rows(small) == rows(first)[:2]


def test_no_text_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"no text .* nearest: --corpus"):
        write_corpus(tmp_path / "c.jsonl.gz", [Place("empty", tmp_path / "empty")], 10**6)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty"]


def test_the_standard_library_is_listed_with_its_tests_and_without_packages() -> None:
    library = next(place for place in places() if place.name == "standard library")
    files = list(list_files(library))
    assert files == sorted(set(files), key=files.index) and any(path.name == "argparse.py" for path in files)
    assert not any("site-packages" in path.parts for path in files)
    if (library.root / "test" / "test_argparse.py").exists():  # some distributions ship it separately
        assert library.root / "test" / "test_argparse.py" in files
