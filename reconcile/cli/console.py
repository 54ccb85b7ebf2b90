"""What the console script and ``python -m modelstow`` run: the short way first, then the whole command line."""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn


def console() -> NoReturn:
    """Run the command line of this process and end it."""
    for stream in (sys.stdout, sys.stderr):  # a path may hold what a terminal, or Unicode, has no character for
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    from .shortcut import answer

    try:
        code = answer(sys.argv[1:], os.environ)
    except KeyboardInterrupt:
        from .main import end_interrupted

        code = end_interrupted(sys.argv[1:])
    if code is None:
        code = _run()
    sys.exit(code)


def _run() -> int:
    import gc

    from .main import main

    # A lockfile of 100,000 files is a million small objects that all live to the end: looking for cycles among them
    # again and again takes a quarter of the time.
    gc.set_threshold(200_000, 50, 50)
    return main(sys.argv[1:])
