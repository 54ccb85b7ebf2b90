"""Paths as people and environments write them."""

from __future__ import annotations

import os


def absolute_path(text: str | os.PathLike[str]) -> str:
    """An absolute path. `~` and `~user` at its beginning are home folders: variables are often set without a shell.

    Raises InvalidConfigError where there is no such home folder.
    """
    path = os.fspath(text)
    if path.startswith("~"):
        path = os.path.expanduser(path)
        if path.startswith("~"):
            from .errors import InvalidConfigError

            user = path.partition("/")[0]
            hint = f"write the whole path, or ./{user} for a folder of that name"
            raise InvalidConfigError(f"{path}: there is no home folder {user}", hint=hint)
    return os.path.abspath(path)
