"""Bytes in flight: turns a locator and a range into bytes, and says what went wrong. Knows no digest and no store."""

from .errors import (
    Denied,
    EndedEarly,
    Full,
    Misbehaved,
    NotFound,
    NotListable,
    Offline,
    SourceError,
    Throttled,
    TimedOut,
    Unreachable,
    redact,
)
from .registry import Registry, open_source
from .source import Body, Listed, Listing, Source, beginnings, join, read_all

__all__ = [
    "Body",
    "Denied",
    "EndedEarly",
    "Full",
    "Listed",
    "Listing",
    "Misbehaved",
    "NotFound",
    "NotListable",
    "Offline",
    "Registry",
    "Source",
    "SourceError",
    "Throttled",
    "TimedOut",
    "Unreachable",
    "beginnings",
    "join",
    "open_source",
    "read_all",
    "redact",
]
