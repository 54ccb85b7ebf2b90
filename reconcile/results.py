"""What is told when something was done or looked into."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from modelstow.cas import Digest

from .errors import ModelstowError
from .events.report import Report
from .planning.state import DesiredTree, ModelState


@dataclass(frozen=True, slots=True, kw_only=True)
class TreeResult:
    """How one tree stands after an apply."""

    model: str
    variant: str
    path: Path
    state: ModelState
    changed: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ApplyResult:
    """What an apply achieved; ``error`` tells what failed beside it."""

    trees: tuple[TreeResult, ...]
    report: Report
    error: ModelstowError | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class IntegrityReport:
    """What reading one variant showed. Lists are paths within the tree."""

    success: bool
    verified_files: tuple[str, ...] = ()
    failed_files: tuple[str, ...] = ()
    missing_files: tuple[str, ...] = ()
    error_message: str = ""

    @classmethod
    def absent(cls, tree: DesiredTree) -> IntegrityReport:
        """There is no such tree."""
        return cls(success=False, missing_files=tuple(sorted(tree.files)), error_message=f"{tree.path} does not exist")

    @classmethod
    def of(cls, tree: DesiredTree, faulty: set[str]) -> IntegrityReport:
        """A tree that was read, with *faulty* paths."""
        kinds = {path: _judged(tree.path / path, digest, faulty) for path, digest in sorted(tree.files.items())}
        missing = tuple(path for path, kind in kinds.items() if kind == "missing")
        failed = tuple(path for path, kind in kinds.items() if kind == "failed")
        return cls(
            success=not failed and not missing,
            verified_files=tuple(path for path, kind in kinds.items() if not kind),
            failed_files=failed,
            missing_files=missing,
            error_message=f"{len(failed)} damaged, {len(missing)} missing" if failed or missing else "",
        )


def _judged(path: Path, digest: Digest, faulty: set[str]) -> str:
    """``missing``, ``failed``, or nothing for a file whose content is right, whoever put it there."""
    if not os.path.lexists(path):
        return "missing"
    if str(path) not in faulty:
        return ""
    try:
        return "" if Digest.of_path(path) == digest else "failed"
    except OSError:
        return "failed"
