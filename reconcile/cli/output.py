"""Output of commands: figures for people, tables, and errors."""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from typing import Any


def size(count: int) -> str:
    """Bytes with a decimal unit: 90.9 MB."""
    value = float(count)
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(value) < 1000 or unit == "TB":
            return f"{count} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    raise AssertionError


def count(number: int, noun: str) -> str:
    """``1 file``, ``2 files``."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def seconds(value: float) -> str:
    """A time that is neither cut to nothing nor too exact."""
    return f"{value:.2f} s" if value < 10 else f"{value:.0f} s"


def table(rows: Iterable[Sequence[str]], *, right: frozenset[int] = frozenset()) -> list[str]:
    """Columns of equal width; those in *right* are aligned to the right."""
    every = [list(row) for row in rows]
    if not every:
        return []
    widths = [max(len(row[i]) for row in every) for i in range(len(every[0]))]
    lines = []
    for row in every:
        cells = [cell.rjust(widths[i]) if i in right else cell.ljust(widths[i]) for i, cell in enumerate(row)]
        lines.append("  ".join(cells).rstrip())
    return lines


def dump(document: Mapping[str, Any]) -> str:
    """One JSON document of one line. Paths become text; what is no Unicode is escaped."""
    import json

    return json.dumps(document, default=str, separators=(", ", ": "))


def write_lines(lines: Sequence[str]) -> int:
    """Write lines to standard output; the exit code: 0, or 1 where it was closed or could not be written."""
    try:
        sys.stdout.write("".join(f"{line}\n" for line in lines))
        sys.stdout.flush()
    except BrokenPipeError:
        discard_output()
        return 1
    except OSError as error:  # a full disk behind a redirection
        discard_output()
        from ..errors import FilesystemError

        report_error(FilesystemError(f"standard output cannot be written: {error.strerror}"))
        return 1
    return 0


def discard_output() -> None:
    """Discard all further output, whose reader went away (`| head`)."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def error_document(error: BaseException) -> dict[str, Any]:
    """The value of ``error`` in a document."""
    code, message, hint, details = _facts(error)
    return {"code": code, "message": message, "hint": hint, "details": details}


def report_error(error: BaseException, *, as_event: bool = False) -> str:
    """Report an error: what, where, and what to do next; its code."""
    code, message, hint, _ = _facts(error)
    if as_event:
        import json

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
    from ..hints import hint_of

    ours = as_ours(error)
    if ours is not None:
        return ours.code, ours.what, hint_of(ours), ours.details
    if isinstance(error, SourceError):
        rows = [{"source": error.locator, "code": error.code, "reason": error.what}]
        return error.code, str(error), hint_of(error), {"sources": rows}
    hint = "this is a bug; run it again with --verbose for a traceback to report"
    return "UNKNOWN_ERROR", f"{type(error).__name__}: {error}", hint, {}
