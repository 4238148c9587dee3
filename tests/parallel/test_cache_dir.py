"""Kernels and other files that are executed are loaded only from folders that nobody else can write to."""

import ctypes
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from ops.cpp import build
from parallel import cache_dir


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Compiles or loads a library of one function in an empty home and returns what that function does."""
    source = tmp_path / "one.cpp"
    source.write_text('extern "C" int one() { return 1; }\n')
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(build, "SOURCES", [source])
    monkeypatch.setattr(build, "FLAGS", ["-fPIC"])
    return lambda: ctypes.CDLL(str(build.library())).one()


def kernels() -> list[Path]:
    return sorted(Path("~/.cache/switchyard/kernels").expanduser().glob("*.so"))


@pytest.mark.parametrize("folder", ["", "kernels"])
def test_a_folder_that_others_can_write_to_is_refused(load: Callable[[], int], folder: str) -> None:
    assert load() == 1
    shared = Path("~/.cache/switchyard").expanduser() / folder
    for mode in (0o775, 0o757, 0o1777):
        shared.chmod(mode)
        with pytest.raises(OSError, match=r"is writable by other users.*chmod go-w"):
            load()
    shared.chmod(0o755)
    assert load() == 1


def test_a_library_that_others_could_have_written_is_compiled_anew(
    load: Callable[[], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert load() == 1
    (made,) = kernels()
    made.chmod(0o777)
    before = made.stat().st_ino
    assert load() == 1
    (made,) = kernels()
    assert made.stat().st_ino != before and made.stat().st_mode & 0o22 == 0
    # Another user's file under that name, as far as this process can tell.
    looked = os.lstat
    foreign = os.stat_result([*looked(made)[:4], 12345, *looked(made)[5:]])
    monkeypatch.setattr(os, "lstat", lambda path, **k: foreign if Path(path) == made else looked(path, **k))
    assert "belongs to another user (uid 12345)" in str(cache_dir.untrusted_reason(made))


def test_a_library_whose_bytes_are_not_those_of_its_name_is_compiled_anew(load: Callable[[], int]) -> None:
    assert load() == 1
    (made,) = kernels()
    whole = made.read_bytes()
    made.unlink()  # this process has it mapped
    made.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert load() == 1 and made.read_bytes() == whole


def test_a_link_is_not_followed(load: Callable[[], int], tmp_path: Path) -> None:
    assert load() == 1
    (made,) = kernels()
    made.rename(tmp_path / "elsewhere.so")
    made.symlink_to(tmp_path / "elsewhere.so")
    assert load() == 1 and not made.is_symlink()


def test_folders_are_made_for_this_user_alone_whatever_the_umask(tmp_path: Path) -> None:
    previous = os.umask(0)
    try:
        cache_dir.make_private(tmp_path / "a" / "b")
    finally:
        os.umask(previous)
    cache_dir.check_private(tmp_path / "a" / "b", tmp_path / "a")
    assert cache_dir.untrusted_reason(tmp_path / "a") is None
