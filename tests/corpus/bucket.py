"""A file system of fsspec, `bucket://`, that counts requests and answers late, partly or not at all."""

import threading
from collections.abc import Callable
from typing import Any, ClassVar

import fsspec
import pytest
from fsspec import AbstractFileSystem


class Bucket(AbstractFileSystem):
    protocol = "bucket"
    cachable = False
    objects: ClassVar[dict[str, bytes]] = {}
    tags: ClassVar[dict[str, str]] = {}
    """ETag by object."""
    requests: ClassVar[list[tuple[str, int]]] = []
    """(object, begin) of every range that was asked for, in the order in which they came."""
    changed: ClassVar[threading.Condition] = threading.Condition()
    answer: ClassVar[Callable[[str, int, bytes], bytes]]
    """(object, begin, content) -> what is answered."""

    @classmethod
    def reset(cls) -> None:
        for kept in (cls.objects, cls.tags, cls.requests):
            kept.clear()
        cls.answer = staticmethod(lambda path, begin, content: content)

    @classmethod
    def write(cls, path: str, content: bytes) -> None:
        cls.objects[path] = content
        cls.tags[path] = str(int(cls.tags.get(path, "0")) + 1)

    @classmethod
    def await_requests(cls, count: int) -> None:
        with cls.changed:
            assert cls.changed.wait_for(lambda: len(cls.requests) >= count, 60.0)

    def ls(self, path: str, detail: bool = True, **kwargs: Any) -> list[Any]:
        path = self._strip_protocol(path)
        found = {}
        for name, content in self.objects.items():
            if name == path:
                found[name] = {"name": name, "size": len(content), "type": "file", "ETag": self.tags[name]}
            elif not path or name.startswith(f"{path}/"):
                first = name.removeprefix(f"{path}/" if path else "").partition("/")[0]
                child = f"{path}/{first}" if path else first
                file = {"name": child, "size": len(content), "type": "file", "ETag": self.tags[name]}
                found[child] = file if child == name else {"name": child, "size": 0, "type": "directory"}
        if not found:
            raise FileNotFoundError(path)
        return list(found.values()) if detail else list(found)

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **kwargs: Any) -> bytes:
        path = self._strip_protocol(path)
        with self.changed:
            self.requests.append((path, start or 0))
            self.changed.notify_all()
        return type(self).answer(path, start or 0, self.objects[path][start:end])

    def put_file(self, lpath: str, rpath: str, *args: Any, **kwargs: Any) -> None:
        with open(lpath, "rb") as file:
            self.write(self._strip_protocol(rpath), file.read())


def without_network(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """From now on every request of the bucket fails; returns those that were tried."""
    tried: list[str] = []

    def fail(self: Bucket, path: str, *args: object, **kwargs: object) -> bytes:
        tried.append(path)
        raise ConnectionError("Cannot connect to host bucket:443")

    for method in ("ls", "info", "find", "glob", "cat_file"):
        monkeypatch.setattr(Bucket, method, fail)
    return tried


fsspec.register_implementation("bucket", Bucket, clobber=True)
Bucket.reset()
