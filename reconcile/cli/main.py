"""The entry point: parse, run one command, answer in JSON or for people, end with the right exit code."""

from __future__ import annotations

import gc
import importlib
import os
import signal
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

from .. import __version__
from . import arguments

if TYPE_CHECKING:
    from .session import Answer, Session

_WHERE = {
    "manifest": ("init", "add", "remove", "lock"),
    "disk": ("plan", "reconcile", "ensure", "status", "verify"),
    "keeping": ("gc", "evict", "pin", "unpin"),
    "exchange": ("push",),
    "looking": ("ls", "du", "which", "diff"),
    "doctor": ("doctor",),
    "bench": ("bench",),
}


class _Terminated(BaseException):
    """SIGTERM arrived."""


def console() -> NoReturn:
    """What the console script runs."""
    # A lockfile of 100,000 files is a million small objects that all live to the end: looking for cycles among them
    # again and again takes a quarter of the time.
    gc.set_threshold(200_000, 50, 50)
    sys.exit(main(sys.argv[1:]))


def main(argv: Sequence[str], environ: Mapping[str, str] | None = None) -> int:
    """Run one command line; its exit code. Never raises and never prints a traceback without ``--verbose``."""
    as_json, verbose = "--json" in argv, "--verbose" in argv or "-v" in argv
    previous = signal.getsignal(signal.SIGTERM)
    try:
        signal.signal(signal.SIGTERM, _on_sigterm)
    except ValueError:
        pass  # not in the main thread: whoever embeds us handles signals
    try:
        return _run(argv, os.environ if environ is None else environ, as_json=as_json, verbose=verbose)
    except (KeyboardInterrupt, _Terminated) as signalled:
        code, what = (130, "interrupted") if isinstance(signalled, KeyboardInterrupt) else (143, "terminated")
        from ..errors import ModelstowError

        hint = "run the same command again: it continues from what is proven"
        _complain(ModelstowError(what, hint=hint), {}, as_json=as_json)
        sys.stdout.flush()
        sys.stderr.flush()
        # Threads may sit in a read for a minute; what they leave behind is what a kill would leave.
        os._exit(code)
    finally:
        try:
            signal.signal(signal.SIGTERM, previous)
        except (ValueError, TypeError):
            pass


def _run(argv: Sequence[str], environ: Mapping[str, str], *, as_json: bool, verbose: bool) -> int:
    try:
        args = arguments.parser(__version__).parse_args(argv)
    except SystemExit as ended:  # --help, --version
        return ended.code if isinstance(ended.code, int) else 0
    except Exception as error:
        return _complain(error, {}, as_json=as_json)
    from .session import Answer, Session  # --help and --version are over before this

    try:
        session = Session(args, environ)
        answer = _command(args.command)(session)
    except BrokenPipeError:
        return _quietly_closed()
    except Exception as error:
        if verbose:
            traceback.print_exc()
        answer = Answer(error=error)
    try:
        return _give(answer, as_json=as_json)
    except BrokenPipeError:
        return _quietly_closed()
    except OSError as error:  # a full disk behind a redirection
        _quietly_closed()
        print(f"error: standard output cannot be written: {error.strerror}", file=sys.stderr)
        return 1


def _command(name: str) -> Callable[[Session], Answer]:
    """The function of a command; its module is loaded only now."""
    module = next(module for module, names in _WHERE.items() if name in names)
    function: Callable[[Session], Answer] = getattr(importlib.import_module(f".{module}", __package__), f"run_{name}")
    return function


def _give(answer: Answer, *, as_json: bool) -> int:
    if answer.error is not None:
        if not as_json:
            _print_lines(answer.lines)
        return _complain(answer.error, answer.document, as_json=as_json)
    if as_json:
        from .session import dump

        print(dump({"schema": 1, "ok": True, **answer.document}))
    else:
        _print_lines(answer.lines)
    sys.stdout.flush()
    return answer.code


def _print_lines(lines: Sequence[str]) -> None:
    for line in lines:
        print(line.encode("utf-8", "replace").decode("utf-8"))


def _complain(error: BaseException, document: Mapping[str, Any], *, as_json: bool) -> int:
    """Say what went wrong, where, and what next; the exit code."""
    from ..errors import exit_code
    from .session import dump

    code, message, hint, details = _facts(error)
    if as_json:
        failure = {"code": code, "message": message, "hint": hint, "details": details}
        print(dump({"schema": 1, "ok": False, **document, "error": failure}))
        sys.stdout.flush()
    print(f"error: {message}".encode("utf-8", "replace").decode("utf-8"), file=sys.stderr)
    if hint:
        print(f"hint: {hint}", file=sys.stderr)
    return exit_code(code)


def _facts(error: BaseException) -> tuple[str, str, str, Mapping[str, Any]]:
    from backends import SourceError

    from ..errors import as_ours

    ours = as_ours(error)
    if ours is not None:
        return ours.code, ours.what, ours.hint, ours.details
    if isinstance(error, SourceError):
        rows = [{"source": error.locator, "code": error.code, "reason": error.what}]
        return error.code, str(error), error.hint, {"sources": rows}
    hint = "this is a bug; run it again with --verbose for a traceback to report"
    return "UNKNOWN_ERROR", f"{type(error).__name__}: {error}", hint, {}


def _quietly_closed() -> int:
    """Whoever read our output went away (`| head`)."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 1


def _on_sigterm(number: int, frame: FrameType | None) -> None:
    raise _Terminated
