"""The entry point: parse, run one command, answer in JSON or for people, end with the right exit code."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from types import FrameType

from modelstow import __version__

from . import parser

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from .session import Answer, Session

_WHERE = {
    "manifest": ("init", "add", "remove", "lock"),
    "sync": ("plan", "reconcile", "ensure", "status", "verify"),
    "retention": ("gc", "evict", "release", "pin", "unpin"),
    "mirror": ("push",),
    "inspect": ("ls", "du", "which", "diff"),
    "doctor": ("doctor",),
    "bench": ("bench",),
}


class _Terminated(BaseException):
    """SIGTERM arrived."""


def main(argv: Sequence[str], environ: Mapping[str, str] | None = None) -> int:
    """Run one command line; its exit code. Never raises and never prints a traceback without ``--verbose``."""
    form = _Form.asked(argv)
    previous = signal.getsignal(signal.SIGTERM)
    try:
        signal.signal(signal.SIGTERM, _on_sigterm)
    except ValueError:
        pass  # not in the main thread: the embedding program handles signals
    try:
        return _run(argv, os.environ if environ is None else environ, form)
    except (KeyboardInterrupt, _Terminated) as signalled:
        code, what = (130, "interrupted") if isinstance(signalled, KeyboardInterrupt) else (143, "terminated")
        _report_signal(what, form)
        # Threads may sit in a read for a minute; what they leave behind is what a kill would leave.
        os._exit(code)
    finally:
        try:
            signal.signal(signal.SIGTERM, previous)
        except (ValueError, TypeError):
            pass


def end_interrupted(argv: Sequence[str]) -> int:
    """Report an interrupt that came before the command line was parsed; the exit code."""
    _report_signal("interrupted", _Form.asked(argv))
    return 130


def _report_signal(what: str, form: _Form) -> None:
    from ..errors import ModelstowError

    hint = "run the same command again: it continues from what is verified"
    _complain(ModelstowError(what, hint=hint), {}, form)
    sys.stdout.flush()
    sys.stderr.flush()


class _Form:
    """The form of the answer, known before the command line is parsed, which may fail.

    A plain class: the modules behind named tuples and dataclasses double what ``--help`` loads.
    """

    __slots__ = ("as_events", "as_json", "verbose")

    def __init__(self, *, as_json: bool, as_events: bool, verbose: bool) -> None:
        self.as_json, self.as_events, self.verbose = as_json, as_events, verbose

    @classmethod
    def asked(cls, argv: Sequence[str]) -> _Form:
        as_events = "--progress=json" in argv or ("--progress", "json") in pairwise(argv)
        return cls(as_json="--json" in argv, as_events=as_events, verbose="--verbose" in argv or "-v" in argv)


def _run(argv: Sequence[str], environ: Mapping[str, str], form: _Form) -> int:
    try:
        args = parser.build_parser(__version__, argv[0] if argv else "").parse_args(argv)
    except SystemExit as ended:  # --help, --version
        return ended.code if isinstance(ended.code, int) else 0
    except Exception as error:
        return _complain(error, {}, form)
    from .session import Answer, Session  # --help and --version are over before this

    try:
        session = Session(args, environ)
        answer = _command(args.command)(session)
    except BrokenPipeError:
        return _closed()
    except Exception as error:
        if form.verbose:
            import traceback

            traceback.print_exc()
        answer = Answer(error=error)
    try:
        return _give(answer, form)
    except BrokenPipeError:
        return _closed()
    except OSError as error:  # a full disk behind a redirection
        _closed()
        from ..errors import FilesystemError
        from . import output

        output.report_error(
            FilesystemError(f"standard output cannot be written: {error.strerror}"), as_event=form.as_events
        )
        return 1


def _command(name: str) -> Callable[[Session], Answer]:
    """The function of a command; its module is loaded only now."""
    import importlib

    module = next(module for module, names in _WHERE.items() if name in names)
    function: Callable[[Session], Answer] = getattr(importlib.import_module(f".{module}", __package__), f"run_{name}")
    return function


def _give(answer: Answer, form: _Form) -> int:
    if answer.error is not None:
        if not form.as_json:
            _print_lines(answer.lines)
        return _complain(answer.error, answer.document, form)
    if form.as_json:
        from .output import dump

        print(dump({"schema": 1, "ok": True, **answer.document}))
    else:
        _print_lines(answer.lines)
    sys.stdout.flush()
    return answer.code


def _print_lines(lines: Sequence[str]) -> None:
    for line in lines:
        print(line)


def _complain(error: BaseException, document: Mapping[str, Any], form: _Form) -> int:
    """Report an error: what, where, and what to do next; the exit code."""
    from ..errors import exit_code
    from . import output

    if form.as_json:
        from .output import dump

        print(dump({"schema": 1, "ok": False, **document, "error": output.error_document(error)}))
        sys.stdout.flush()
    return exit_code(output.report_error(error, as_event=form.as_events))


def _closed() -> int:
    from . import output

    output.discard_output()
    return 1


def _on_sigterm(number: int, frame: FrameType | None) -> None:
    raise _Terminated
