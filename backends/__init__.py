"""Sources of bytes: HTTP, S3, model hubs and folders behind one interface.

A source maps a locator and a byte range to a body, and classifies failures. It knows neither
digests nor the store.
"""

from .errors import (
    AccessDenied,
    Changed,
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
from .source import Body, Listed, Listing, PipelinedSource, Source, join_locator, locator_prefixes, read_all

__all__ = [
    "AccessDenied",
    "Body",
    "Changed",
    "ConnectionFailed",
    "EndedEarly",
    "Listed",
    "Listing",
    "NotFound",
    "NotListable",
    "Offline",
    "PipelinedSource",
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
