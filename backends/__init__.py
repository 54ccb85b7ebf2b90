"""Bytes in flight: turns a locator and a range into bytes, and says what went wrong. Knows no digest and no store."""

from .errors import (
    AccessDenied,
    ConnectionFailed,
    EndedEarly,
    NotFound,
    NotListable,
    Offline,
    ProtocolError,
    SourceError,
    TargetFull,
    Throttled,
    TimedOut,
    redact,
)
from .registry import Registry, open_source
from .source import Body, Listed, Listing, Source, join_locator, locator_prefixes, read_all

__all__ = [
    "AccessDenied",
    "Body",
    "ConnectionFailed",
    "EndedEarly",
    "Listed",
    "Listing",
    "NotFound",
    "NotListable",
    "Offline",
    "ProtocolError",
    "Registry",
    "Source",
    "SourceError",
    "TargetFull",
    "Throttled",
    "TimedOut",
    "join_locator",
    "locator_prefixes",
    "open_source",
    "read_all",
    "redact",
]
