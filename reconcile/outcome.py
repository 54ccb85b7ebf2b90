"""What is told when something was done or looked into."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from cas import Digest

from .errors import ModelstowError
from .planning.state import ModelState
from .telemetry.report import Report


@dataclass(frozen=True, slots=True, kw_only=True)
class TreeOutcome:
    """How one tree stands after an apply."""

    model: str
    variant: str
    path: Path
    state: ModelState
    changed: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What an apply achieved; ``error`` tells what failed beside it."""

    trees: tuple[TreeOutcome, ...]
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


def judged(path: Path, digest: Digest, faulty: set[str]) -> str:
    """``missing``, ``failed``, or nothing for a file whose content is right, whoever put it there."""
    if not os.path.lexists(path):
        return "missing"
    if str(path) not in faulty:
        return ""
    try:
        return "" if Digest.of_path(path) == digest else "failed"
    except OSError:
        return "failed"
