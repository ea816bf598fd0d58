"""Result files: what may stand in them, how they are written and read, their provenance, and the cache.

A name is loaded when it is first used: the schema alone needs no torch.
"""

from importlib import import_module

_WHERE = {
    "sdnb.records.cache": ("cached",),
    "sdnb.records.declared": ("SCHEMAS", "schema_markdown", "schema_of"),
    "sdnb.records.provenance": ("Measure", "gather"),
    "sdnb.records.schema": ("Field", "Schema"),
    "sdnb.records.shelf": ("read_all", "stored"),
    "sdnb.records.sources": ("package_fingerprint",),
    "sdnb.records.store": ("Record", "read", "write"),
}
_MODULE_OF = {name: module for module, names in _WHERE.items() for name in names}

__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> object:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'sdnb.records' has no attribute {name!r}")
    return getattr(import_module(_MODULE_OF[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
