"""Presence: whether anything is at a path, where nothing being there leads to deleting or overwriting something.

Only ENOENT and ENOTDIR are absence. A path that may not be looked at (EACCES), whose disk or server does not answer (EIO,
ESTALE) or that cannot be walked (ELOOP) may hold anything: that is an error here, and never False.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path


def look(path: str | Path) -> os.stat_result | None:
    """The stat of *path* itself, following no symlink there; None where nothing is. Raises OSError where it is not seen."""
    try:
        return os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None


def exists(path: str | Path) -> bool:
    """Whether anything is at *path*, also a symlink that dangles. Raises OSError where that cannot be seen."""
    return look(path) is not None


def is_folder(path: str | Path) -> bool:
    """Whether a folder is at *path*, and not a symlink to one. Raises OSError where that cannot be seen."""
    found = look(path)
    return found is not None and stat.S_ISDIR(found.st_mode)
