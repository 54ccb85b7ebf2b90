"""The console script, also of ``python -m modelstow``: the shortcut first, then the whole command line.

Modules are imported where they are needed: half the time of a short command is reading modules.
"""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn, TextIO


_SHORT = ("reconcile", "ensure", "status", "plan")  # the commands that a snapshot may answer


def console() -> NoReturn:
    """Run the command line of this process and end it."""
    # A closed stream is None, and what is printed to it is lost, as with any other program.
    sys.stdout, sys.stderr = sys.stdout or _nowhere(), sys.stderr or _nowhere()
    for stream in (sys.stdout, sys.stderr):  # a path may hold what a terminal, or Unicode, has no character for
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        code = _short_way(sys.argv[1:])
    except KeyboardInterrupt:
        from .main import end_interrupted

        code = end_interrupted(sys.argv[1:])
    if code is None:
        code = _run()
    sys.exit(code)


def _nowhere() -> TextIO:
    return open(os.devnull, "w")


def _short_way(argv: list[str]) -> int | None:
    """The exit code of a command that was answered without the argument parser; None where that is needed."""
    if argv == ["--version"]:
        from modelstow import __version__

        from .output import write_lines

        return write_lines([f"modelstow {__version__}"])
    if argv and argv[0] in _SHORT:
        from .shortcut import answer

        return answer(argv, os.environ)
    return None


def _run() -> int:
    import gc

    from .main import main

    # A lockfile of 100,000 files is a million small objects that all live to the end: looking for cycles among them
    # again and again takes a quarter of the time.
    gc.set_threshold(200_000, 50, 50)
    return main(sys.argv[1:])
