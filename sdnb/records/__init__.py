"""Result files: what may stand in them, how they are written and read, their provenance, and the cache."""

from sdnb.records.cache import cached
from sdnb.records.declared import SCHEMAS, schema_markdown, schema_of
from sdnb.records.provenance import Measure, gather, package_fingerprint
from sdnb.records.schema import Field, Schema
from sdnb.records.store import Record, read, write

__all__ = [
    "SCHEMAS",
    "Field",
    "Measure",
    "Record",
    "Schema",
    "cached",
    "gather",
    "package_fingerprint",
    "read",
    "schema_markdown",
    "schema_of",
    "write",
]
