"""The content of files that may be compressed, in blocks, lines or as a stream."""

import bz2
import io
import lzma
import re
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from corpus import storage

_BLOCK = 256 * 1024
_MAX_ZSTD_WINDOW = 2**31  # bytes, as of `zstd --long=31`
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
COMPRESSIONS = (".gz", ".zst", ".bz2", ".xz")
"""Suffixes."""
_BEGINNINGS = {
    ".gz": rb"\x1f\x8b\x08",
    ".zst": rb"\x28\xb5\x2f\xfd",
    ".bz2": rb"BZh[1-9]1AY&SY",
    ".xz": rb"\xfd7zXZ\0",
}


class Damaged(Exception):
    """Compressed data that is invalid or ends too early."""


def blocks(path: str) -> Iterator[tuple[bytes, float]]:
    """The content of a plain or compressed file, and the fraction of the file read so far.

    Raises:
        Damaged: see there.
        OSError: the file cannot be read.
    """
    if path.endswith(".zst"):
        import zstandard

        new_frame = zstandard.ZstdDecompressor(max_window_size=_MAX_ZSTD_WINDOW).decompressobj
        return _decompressed(path, new_frame, (zstandard.ZstdError,))
    if path.endswith(".gz"):
        return _decompressed(path, partial(zlib.decompressobj, wbits=31), (zlib.error,))
    if path.endswith(".bz2"):
        return _decompressed(path, bz2.BZ2Decompressor, (OSError, ValueError))
    if path.endswith(".xz"):
        return _decompressed(path, lzma.LZMADecompressor, (lzma.LZMAError,))
    return _raw_blocks(path)


def lines(path: str) -> Iterator[tuple[bytes, float]]:
    """Lines of a plain or compressed file, without their newline, and the fraction of the file read so far; raises as
    `blocks`."""
    begun: list[bytes] = []  # parts of an incomplete line, joined once so that long lines take linear time
    for block, done in blocks(path):
        first, *others = block.split(b"\n")
        begun.append(first)
        if others:
            *complete, rest = b"".join(begun), *others
            for line in complete:
                yield line, done
            begun = [rest]
    if line := b"".join(begun):
        yield line, 1.0


class ContentStream(io.RawIOBase):
    """The content of a plain or compressed file; raises as `blocks`."""

    def __init__(self, path: str) -> None:
        self._blocks, self._rest = blocks(path), memoryview(b"")
        self.done = 0.0
        """Fraction of the file read so far."""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        while not self._rest:
            block, self.done = next(self._blocks, (None, 1.0))
            if block is None:
                return 0
            self._rest = memoryview(block)
        count = min(len(buffer), len(self._rest))
        buffer[:count], self._rest = self._rest[:count], self._rest[count:]
        return count


def without_mark(start: bytes, path: str) -> bytes:
    """The beginning of a file, or of another that was appended to it, without its byte-order mark.

    Raises:
        ValueError: it has the byte-order mark of UTF-16, or is compressed though no suffix says so.
    """
    for suffix, beginning in _BEGINNINGS.items():
        if re.match(beginning, start):
            raise ValueError(f"{path} has compressed data instead of text: decompress it, or add {suffix} to its name")
    if start.startswith((b"\xff\xfe", b"\xfe\xff")) and b"\0" in start:
        raise ValueError(f"{path} is in UTF-16, not UTF-8; convert it: iconv -f UTF-16 -t UTF-8")
    return start.removeprefix(BYTE_ORDER_MARK)


def _raw_blocks(path: str) -> Iterator[tuple[bytes, float]]:
    size, position = storage.size(path), 0
    with storage.open_binary(path) as file:
        while block := file.read(_BLOCK):
            position += len(block)
            yield block, position / max(size, position)


def _decompressed(
    path: str, new_frame: Callable[[], Any], errors: tuple[type[Exception], ...]
) -> Iterator[tuple[bytes, float]]:
    """The content of the concatenated frames (zstd), members (gzip) or streams (bz2, xz) of a file.

    Args:
        errors: what `decompress` raises for invalid data.
    """
    frame = None
    for block, done in _raw_blocks(path):
        while True:
            if frame is None:
                block = block.lstrip(b"\0")  # some files are padded with zeros
                if not block:
                    break
                frame = new_frame()
            try:
                content = frame.decompress(block)
            except errors as error:
                raise Damaged(str(error)) from error
            yield content, done
            if not frame.eof:
                break
            block, frame = frame.unused_data, None
    if frame is not None:
        raise Damaged("it ends in the middle of the compressed data")
