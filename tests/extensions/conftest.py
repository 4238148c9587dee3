"""Registries are after each test as they were before."""

from collections.abc import Iterator
from importlib import import_module

import pytest

from conf import extensions
from conf.registry import Registry

WITHOUT_A_SETTING = {"moe.router_metrics": "ROUTER_METRICS", "corpus.readers.formats": "FORMATS"}
REGISTRIES = WITHOUT_A_SETTING | dict(extensions.REGISTRIES.values())


@pytest.fixture(autouse=True)
def registries() -> Iterator[list[Registry]]:
    """As they were, after each test."""
    found = [getattr(import_module(module), name) for module, name in REGISTRIES.items()]
    before = [dict(registry) for registry in found]
    yield found
    for registry, entries in zip(found, before, strict=True):
        registry.clear()
        registry.update(entries)
