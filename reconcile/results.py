"""Results of applying and verifying, as values for callers."""

from __future__ import annotations

import enum
import os
from dataclasses import dataclass
from pathlib import Path

from modelstow.cas import Digest, Entry, entries

from .errors import ModelstowError
from .events.report import Report
from .planning.state import DesiredTree, ModelState


@dataclass(frozen=True, slots=True, kw_only=True)
class TreeResult:
    """The state of the tree of one variant after an apply."""

    model: str
    variant: str
    path: Path
    state: ModelState
    changed: bool  # by this apply


@dataclass(frozen=True, slots=True, kw_only=True)
class ApplyResult:
    """The result of an apply; ``error`` holds what failed."""

    trees: tuple[TreeResult, ...]
    report: Report
    error: ModelstowError | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class IntegrityReport:
    """The result of verifying one variant. Lists are paths within the tree."""

    success: bool
    verified_files: tuple[str, ...] = ()
    failed_files: tuple[str, ...] = ()
    missing_files: tuple[str, ...] = ()
    error_message: str = ""

    @classmethod
    def absent(cls, tree: DesiredTree) -> IntegrityReport:
        """The report for a tree that does not exist."""
        return cls(success=False, missing_files=tuple(sorted(tree.entries)), error_message=f"{tree.path} does not exist")

    @classmethod
    def of(cls, tree: DesiredTree, faulty: set[str]) -> IntegrityReport:
        """The report for a tree that was read; *faulty* holds the absolute paths of findings."""
        wanted = tree.entries
        states = {path: _file_state(tree.path / path, wanted[path], faulty) for path in sorted(wanted)}

        def paths(state: _FileState) -> tuple[str, ...]:
            return tuple(path for path, found in states.items() if found is state)

        failed, missing = paths(_FileState.FAILED), paths(_FileState.MISSING)
        return cls(
            success=not failed and not missing,
            verified_files=paths(_FileState.VERIFIED),
            failed_files=failed,
            missing_files=missing,
            error_message=f"{len(failed)} damaged, {len(missing)} missing" if failed or missing else "",
        )


class _FileState(enum.Enum):
    VERIFIED = enum.auto()
    FAILED = enum.auto()
    MISSING = enum.auto()


def _file_state(path: Path, entry: Entry, faulty: set[str]) -> _FileState:
    """The state of one file; a drifted file is verified if its content is right."""
    if not os.path.lexists(path):
        return _FileState.MISSING
    if str(path) not in faulty:
        return _FileState.VERIFIED
    try:
        found = Digest.of_path(path) if isinstance(entry, Digest) else entries.read(str(path))
        return _FileState.VERIFIED if found == entry else _FileState.FAILED
    except OSError:
        return _FileState.FAILED
