"""The shortcut of commands that have nothing to do: `reconcile`, `ensure`, `status`, `plan`, by the stat snapshot alone.

``answer`` recognises plain command lines before the argument parser is loaded. Whatever it does not know (an option, a
variable, a selector, anything that changed on disk) goes the long way, which prints the same and finds the reason.
"""

from __future__ import annotations

import os
import sys

from .. import documents, snapshot
from ..project import find_files

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any

    from ..snapshot import Snapshot, Tree

_FLAGS = {"--json", "--quiet", "-q", "--no-progress", "--locked", "--offline"}
_OWN_FLAGS = {"reconcile": set[str](), "status": {"--check"}, "plan": {"--check"}, "ensure": {"--all"}}
_VALUES = ("--root", "--lock", "--manifest")
_FORK_FROM = 50_000  # blobs from which a second process pays
# Variables that change neither what is wanted nor how it is printed.
_PATHS = ("MODELSTOW_ROOT", "MODELS_ROOT", "MODELSTOW_LOCK", "MODELSTOW_MANIFEST", "XDG_DATA_HOME")
_KNOWN = {"MODELSTOW_ROOT", "MODELSTOW_LOCK", "MODELSTOW_MANIFEST", "MODELSTOW_OFFLINE", "MODELSTOW_NO_PROGRESS"}


def answer(argv: Sequence[str], environ: Mapping[str, str]) -> int | None:
    """Print the answer of a command that has nothing to do; its exit code. None where the long way has to be taken, and
    then nothing was printed or changed."""
    if not argv or argv[0] not in _OWN_FLAGS:
        return None
    asked = _Asked.parse(argv)
    if asked is None or any(name.startswith("MODELSTOW_") and name not in _KNOWN for name in environ):
        return None
    if any(value.startswith("~") for value in (*asked.values.values(), *(environ.get(name, "") for name in _PATHS))):
        return None
    try:
        root = _root(asked.values.get("--root"), environ)
        lockfile, manifest = find_files(asked.values.get("--lock"), asked.values.get("--manifest"), environ)
    except OSError:  # the current folder is gone
        return None
    if root is None or lockfile is None:
        return None
    found = snapshot.read(root, lockfile)
    if found is None or found.manifest != (manifest or ""):
        return None
    trees = _chosen(found, asked.selectors)
    whole = trees is not None and len(trees) == len(found.trees)
    if trees is None or not snapshot.holds(found, trees, whole=whole, every_blob=_in_two_processes):
        return None
    return _print(asked, found, trees)


def _in_two_processes(found: Snapshot) -> bool:
    """Whether every blob is unchanged. A child process stats half of many: stats gain nothing from threads."""
    count = len(found.blob_names)
    if count < _FORK_FROM or (os.cpu_count() or 1) < 2:
        return snapshot.blobs_between(found, 0, count)
    child = os.fork()  # this process has one thread, and the child does nothing but stats
    if child == 0:
        code = 1
        try:
            code = 0 if snapshot.blobs_between(found, count // 2, count) else 1
        finally:
            os._exit(code)
    mine = snapshot.blobs_between(found, 0, count // 2)
    _, status = os.waitpid(child, 0)
    return mine and status == 0


class _Asked:
    """A plain command line."""

    __slots__ = ("command", "flags", "selectors", "values")

    def __init__(self, command: str) -> None:
        self.command = command
        self.flags: set[str] = set()
        self.values: dict[str, str] = {}
        self.selectors: list[str] = []

    @classmethod
    def parse(cls, argv: Sequence[str]) -> _Asked | None:
        """The plain command line in the arguments; None where they are not plain."""
        asked = cls(argv[0])
        known = _FLAGS | _OWN_FLAGS[argv[0]]
        rest = list(argv[1:])
        while rest:
            word = rest.pop(0)
            name, equals, value = word.partition("=")
            if word in known:
                asked.flags.add(word)
            elif name in _VALUES and (equals or rest):
                asked.values[name] = value if equals else rest.pop(0)
            elif word.startswith("-") or asked.command == "reconcile":
                return None
            else:
                asked.selectors.append(word)
        if asked.command == "ensure" and bool(asked.selectors) == ("--all" in asked.flags):
            return None
        return asked if all(asked.values.values()) else None


def _root(option: str | None, environ: Mapping[str, str]) -> str | None:
    """The store's root as ``settings.default_root`` finds it; None where only that can."""
    for chosen in (option, environ.get("MODELSTOW_ROOT"), environ.get("MODELS_ROOT")):
        if chosen:
            return os.path.abspath(chosen)
    if data := environ.get("XDG_DATA_HOME"):
        return os.path.join(os.path.abspath(data), "modelstow")
    home = environ.get("HOME", "")
    return f"{home}/.local/share/modelstow" if home.startswith("/") and sys.platform.startswith("linux") else None


def _chosen(found: Snapshot, selectors: Sequence[str]) -> list[Tree] | None:
    """The trees that selectors mean; None where one is not plainly one of them."""
    if not selectors:
        return found.trees
    chosen = []
    for text in selectors:
        model, hash_, variant = text.partition("#")
        named = [t for t in found.trees if model in (t.model, t.model.rpartition("@")[0])]
        if len({tree.model for tree in named}) != 1:
            return None  # none, or several versions
        fitting = [tree for tree in named if (tree.variant == variant if hash_ else tree.default)]
        if len(fitting) != 1:
            return None
        if fitting[0] not in chosen:
            chosen.append(fitting[0])
    return chosen


def _print(asked: _Asked, found: Snapshot, trees: Sequence[Tree]) -> int:
    from . import output

    document: dict[str, Any]
    if asked.command == "status":
        rows = [
            documents.status_row(model=t.model, variant=t.variant, state="COMPLETE", path=t.path, extra=t.extra)
            for t in trees
        ]
        document, lines = {"models": rows}, output.table([documents.status_cells(row, "") for row in rows])
    elif asked.command == "plan":
        free = os.statvfs(found.root)
        document = documents.plan([], documents.plan_summary(free_bytes=free.f_bavail * free.f_frsize))
        lines = [documents.IN_SYNC]
    else:
        rows = [
            documents.tree_row(model=t.model, variant=t.variant, path=t.path, state="COMPLETE", changed=False)
            for t in trees
        ]
        document = documents.result(rows, (), documents.result_summary())
        lines = [t.path for t in trees]
        if asked.command == "reconcile":
            in_sync = f"{documents.IN_SYNC} ({output.seconds(0.0)})"
            lines = [*output.table([documents.tree_cells(row) for row in rows]), in_sync]
        snapshot.touch(found, trees)
    if "--json" in asked.flags:
        lines = [output.dump({"schema": 1, "ok": True, **document})]
    return output.write_lines(lines)
