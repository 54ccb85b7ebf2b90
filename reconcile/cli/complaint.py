"""What went wrong: in a document, and on standard error for people or as an event for programs."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import Any


def field(error: BaseException) -> dict[str, Any]:
    """The value of ``error`` in a document."""
    code, message, hint, details = _facts(error)
    return {"code": code, "message": message, "hint": hint, "details": details}


def tell(error: BaseException, *, as_event: bool = False) -> str:
    """Say what went wrong, where, and what next; its code."""
    code, message, hint, _ = _facts(error)
    if as_event:
        row = {"event": "Failed", "code": code, "message": message, "hint": hint}
        print(json.dumps(row, default=str), file=sys.stderr, flush=True)
        return code
    print(f"error: {message}", file=sys.stderr, flush=True)
    if hint:
        print(f"hint: {hint}", file=sys.stderr, flush=True)
    return code


def _facts(error: BaseException) -> tuple[str, str, str, Mapping[str, Any]]:
    from modelstow.backends import SourceError

    from ..errors import as_ours

    ours = as_ours(error)
    if ours is not None:
        return ours.code, ours.what, ours.hint, ours.details
    if isinstance(error, SourceError):
        rows = [{"source": error.locator, "code": error.code, "reason": error.what}]
        return error.code, str(error), error.hint, {"sources": rows}
    hint = "this is a bug; run it again with --verbose for a traceback to report"
    return "UNKNOWN_ERROR", f"{type(error).__name__}: {error}", hint, {}
