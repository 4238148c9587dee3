import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from corpus import integrity
from corpus.cache import Cache


@pytest.fixture
def open_path() -> Iterator[Path]:
    """A folder that other users can reach, as they cannot reach tmp_path."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


def write(text: str):
    def build(folder: Path) -> None:
        (folder / "a.txt").write_text(text)

    return build


def build_slowly(cache_dir: str, log: str) -> None:
    def build(folder: Path) -> None:
        with open(log, "a") as file:
            file.write("built\n")
        (folder / "a.txt").write_text("half")
        time.sleep(0.3)
        (folder / "a.txt").write_text("whole")

    entry = Cache(cache_dir).entry("things", "key", build)
    assert (entry / "a.txt").read_text() == "whole"


def test_of_several_processes_one_builds_and_the_others_wait(tmp_path):
    arguments = (str(tmp_path), str(tmp_path / "log"))
    processes = [multiprocessing.get_context("spawn").Process(target=build_slowly, args=arguments) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert (tmp_path / "log").read_text() == "built\n"


def test_an_entry_is_found_again_under_its_key_only(tmp_path):
    cache = Cache(str(tmp_path))
    first = cache.entry("things", [1, "a"], write("one"))
    assert Cache(str(tmp_path)).entry("things", [1, "a"], write("two")) == first
    assert (first / "a.txt").read_text() == "one"
    assert cache.entry("things", [1, "b"], write("two")) != first


def test_a_build_that_fails_leaves_nothing(tmp_path):
    cache = Cache(str(tmp_path))

    def fail(folder: Path) -> None:
        (folder / "a.txt").write_text("half")
        raise ValueError("bad line")

    with pytest.raises(ValueError, match="bad line"):
        cache.entry("things", "key", fail)
    assert [path.suffix for path in (tmp_path / "things").iterdir()] == [".lock"]
    assert (cache.entry("things", "key", write("whole")) / "a.txt").read_text() == "whole"


def test_leftovers_are_continued_where_that_is_asked_for(tmp_path):
    """After a signal, or a kill between hashing and renaming; after an error nothing is left."""

    def build(folder: Path, error: type[BaseException] | None = None) -> None:
        (folder / "parts.txt").write_text((folder / "parts.txt").read_text() + "x" if [*folder.iterdir()] else "x")
        if error:
            raise error

    cache = Cache(str(tmp_path))
    with pytest.raises(KeyboardInterrupt):
        cache.entry("kind", 1, lambda folder: build(folder, KeyboardInterrupt), resume=True)
    place = cache.entry("kind", 1, build, resume=True)
    assert (place / "parts.txt").read_text() == "xx"
    place.rename(place.with_suffix(".partial"))  # with the hashes that it has
    assert (cache.entry("kind", 1, build, resume=True) / "parts.txt").read_text() == "xxx"
    notes: list[str] = []
    Cache(str(tmp_path), notes.append).entry("kind", 1, build, resume=True)
    assert not notes
    with pytest.raises(ValueError):
        cache.entry("kind", 2, lambda folder: build(folder, ValueError), resume=True)
    assert (cache.entry("kind", 2, build, resume=True) / "parts.txt").read_text() == "x"


def test_leftovers_of_a_killed_process_are_not_used(tmp_path):
    cache = Cache(str(tmp_path))
    place = cache.entry("things", "key", write("whole"))
    place.rename(place.with_suffix(".partial"))
    (place.with_suffix(".partial") / "half.txt").write_text("half")
    assert sorted(path.name for path in cache.entry("things", "key", write("new")).iterdir()) == ["a.txt", "files.json"]


def test_an_entry_with_a_truncated_or_missing_file_is_built_again(tmp_path):
    cache = Cache(str(tmp_path))
    place = cache.entry("things", "key", write("whole"))
    (place / "a.txt").write_text("who")
    assert (cache.entry("things", "key", write("again")) / "a.txt").read_text() == "again"
    (place / "a.txt").unlink()
    assert (cache.entry("things", "key", write("once more")) / "a.txt").read_text() == "once more"


@pytest.mark.parametrize("size", [9, integrity.ALWAYS_HASHED + 1])
def test_a_flipped_byte_is_found_and_the_entry_built_again(tmp_path, size):
    notes = []
    cache = Cache(str(tmp_path), notes.append)
    place = cache.entry("things", "key", write("a" * size))
    status = (place / "a.txt").stat()
    with open(place / "a.txt", "r+b") as file:
        file.seek(size // 2)
        file.write(b"b")
    os.utime(place / "a.txt", ns=(status.st_atime_ns, status.st_mtime_ns))
    assert (cache.entry("things", "key", write("new")) / "a.txt").read_text() == "new"
    assert notes == [f"{place} is damaged (a.txt has different content than was written); it was rebuilt"]


def test_a_large_file_is_hashed_once_after_it_was_copied(tmp_path, monkeypatch):
    cache, hashed = Cache(str(tmp_path)), []
    place = cache.entry("things", "key", write("a" * (integrity.ALWAYS_HASHED + 1)))
    sha256 = integrity.sha256
    monkeypatch.setattr(integrity, "sha256", lambda path: hashed.append(path) or sha256(path))
    cache.entry("things", "key", write("new"))
    assert hashed == []
    shutil.copy(place / "a.txt", tmp_path / "copy")
    (tmp_path / "copy").rename(place / "a.txt")
    for _ in range(3):
        cache.entry("things", "key", write("new"))
    assert hashed == [place / "a.txt"]


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b'{"a.txt": [5, ""]}', b'{"sha256": "", "content": {}}'])
def test_an_entry_with_a_damaged_list_of_files_is_built_again(tmp_path, content):
    notes = []
    cache = Cache(str(tmp_path), notes.append)
    place = cache.entry("things", "key", write("whole"))
    (place / "files.json").write_bytes(content)
    assert (cache.entry("things", "key", write("again")) / "a.txt").read_text() == "again"
    assert notes == [f"{place} is damaged (files.json is damaged); it was rebuilt"]


AS_ANOTHER_USER = """
import os, sys
from corpus.cache import Cache, ReadOnlyCache  # first, since another user may not be able to read this Python
if os.geteuid() == 0:
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
cache = Cache(sys.argv[1])
print((cache.entry("things", "old", None) / "a.txt").read_text())
try:
    place = cache.entry("things", "new", lambda folder: (folder / "a.txt").write_text("by another"))
    print((place / "a.txt").read_text())
except ReadOnlyCache as error:
    print(error)
cache.save_facts()
"""


def as_another_user(folder: Path) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", AS_ANOTHER_USER, str(folder)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_who_may_not_write_reads_what_is_there(open_path):
    Cache(str(open_path)).entry("things", "old", write("by the first"))
    for folder in (open_path, open_path / "things"):
        folder.chmod(0o555)
    read, message = as_another_user(open_path)
    assert read == "by the first"
    assert "is not there" in message and "set data.cache_dir to a folder that can" in message


def test_another_user_adds_to_a_shared_cache(open_path):
    open_path.chmod(0o777)
    cache = Cache(str(open_path))
    cache.entry("things", "old", write("by the first"))
    place = cache.entry("things", "new", write("gone"))
    shutil.rmtree(place)  # its lock, which the first user made, is left
    assert as_another_user(open_path) == ["by the first", "by another"]


def test_a_fact_is_remembered_until_the_file_changes(tmp_path):
    file = tmp_path / "file"
    file.write_text("abc")
    reads = []

    def length(path: str) -> int:
        reads.append(path)
        return len(Path(path).read_text())

    for _ in range(2):
        cache = Cache(str(tmp_path / "cache"))
        assert cache.fact(str(file), "length", length) == 3
        cache.save_facts()
    assert len(reads) == 1
    file.write_text("xyz!")
    assert cache.fact(str(file), "length", length) == 4
    status = file.stat()
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns + 1))  # same size, other time
    cache.fact(str(file), "length", length)
    assert len(reads) == 3


@pytest.mark.parametrize("way", ["written", "replaced"])
def test_an_edit_that_keeps_size_and_time_is_seen(tmp_path, way):
    file, other = tmp_path / "file", tmp_path / "other"
    file.write_text("abc")
    cache = Cache(str(tmp_path / "cache"))
    before = cache.sha256(str(file))
    status = file.stat()
    (file if way == "written" else other).write_text("xyz")
    if way == "replaced":
        other.rename(file)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (status.st_size, status.st_mtime_ns)
    assert cache.sha256(str(file)) != before


@pytest.mark.parametrize("content", [b"\xff\xfe", b"[]", b'{"sha256": "0", "content": {}}', b"[" * 100_000])
def test_damaged_facts_are_computed_again(tmp_path, content):
    file = tmp_path / "file"
    file.write_text("abc")
    cache = Cache(str(tmp_path / "cache"))
    before = cache.sha256(str(file))
    cache.save_facts()
    (tmp_path / "cache" / "facts.json").write_bytes(content)
    assert Cache(str(tmp_path / "cache")).sha256(str(file)) == before


def test_a_folder_that_cannot_be_made_is_the_users_to_mend(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"set data\.cache_dir"):
        Cache(str(tmp_path / "file" / "below"))


def test_the_cache_in_the_users_home_is_looked_at(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    notes = []
    folder = tmp_path / ".cache" / "switchyard"
    Cache("~/.cache/switchyard", notes.append).entry("things", "key", write("whole"))
    assert notes == [] and all(path.stat().st_mode & 0o22 == 0 for path in (folder, folder / "things"))
    folder.chmod(0o777)
    Cache("~/.cache/switchyard", notes.append)
    assert len(notes) == 1 and f"chmod go-w {folder}" in notes[0]
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    Cache(str(shared), notes.append)
    assert len(notes) == 1
