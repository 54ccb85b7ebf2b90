"""One invocation: its options as settings, what it prints on stderr, and its answer."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelstow.backends.environment import env_flag

from .. import settings
from ..desired import lockfile as lockfiles
from ..desired.lockfile import Lockfile
from ..ensurer import ModelEnsurer
from ..errors import InvalidConfigError, LockfileMissingError
from ..events.bus import EventBus
from ..paths import absolute_path
from ..project import find_files
from ..settings import Settings

if TYPE_CHECKING:
    from ..events.events import Event


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """The answer of a command: a JSON document, the same for people, and the exit code."""

    document: Mapping[str, Any] = field(default_factory=dict)
    lines: tuple[str, ...] = ()
    code: int = 0
    error: Exception | None = None


class Session:
    """One command line in one environment."""

    def __init__(self, args: argparse.Namespace, environ: Mapping[str, str]) -> None:
        """Raises InvalidConfigError for values that make no sense."""
        self.args, self.environ = args, environ
        self.settings = self._settings()
        self.events = EventBus()
        self.events.subscribe(self.on_event)

    # ---- settings

    def _settings(self) -> Settings:
        args = self.args
        lockfile, manifest = find_files(args.lock, args.manifest, self.environ)
        mode = getattr(args, "link_mode", None)
        given: dict[str, object] = {
            "root": _path(args.root),
            "lockfile": _path(lockfile),
            "manifest": _path(manifest),
            "locked": args.locked or None,
            "offline": args.offline or None,
            "link_mode": settings.parse_link_mode(mode) if mode else None,
            "strict_links": getattr(args, "strict_links", False) or None,
            "connections": settings.parse_count(args.connections, "--connections") if args.connections else None,
            "limit_rate": settings.parse_size(args.limit_rate, "--limit-rate") if args.limit_rate else None,
            "lock_timeout_s": settings.parse_seconds(args.lock_timeout, "--lock-timeout") if args.lock_timeout else None,
        }
        if given["limit_rate"] == 0:
            raise InvalidConfigError("--limit-rate 0 would never end", hint="leave it out for no limit")
        return settings.from_environment(self.environ, **given)

    # ---- the lockfile

    def ensurer(self) -> ModelEnsurer:
        """The lockfile and the store. Raises LockfileMissingError, the errors of reading."""
        settings = self.settings
        if settings.lockfile is None:
            raise LockfileMissingError(
                "there is no models.lock here or in a folder above", hint="make one with `modelstow lock`"
            )
        return ModelEnsurer.open(settings=settings, events=self.events.emit)

    def ensurer_with_or_without_lock(self) -> ModelEnsurer:
        """For commands about the store as it is: a lockfile is used where there is one."""
        if self.settings.lockfile is not None and self.settings.lockfile.exists():
            return self.ensurer()
        if self.args.lock:
            return self.ensurer()  # what was named must be there
        return ModelEnsurer(settings=self.settings, lock=Lockfile(manifest="", models={}, blobs={}), events=self.events)

    # ---- talk

    @property
    def quiet(self) -> bool:
        return bool(self.args.quiet)

    @property
    def progress_enabled(self) -> bool:
        """Whether progress bars may be drawn."""
        off = self.args.no_progress or self.quiet or env_flag(self.environ, "MODELSTOW_NO_PROGRESS")
        return not off and self.args.progress == "auto" and sys.stderr.isatty()

    @property
    def json_progress(self) -> bool:
        """Whether standard error is for programs: events alone, one a line."""
        return bool(self.args.progress == "json")

    def print_message(self, text: str) -> None:
        """Print a line on stderr for people, or an event for programs."""
        if self.json_progress:
            from ..events.events import Info

            self.on_event(Info(text=text))
        elif not self.quiet:
            print(text, file=sys.stderr)

    def on_event(self, event: Event) -> None:
        """Print what concerns the user of an event."""
        from ..events.events import Info, SourceFailed, Waiting, Warning

        if self.json_progress:
            print(event_row(event), file=sys.stderr, flush=True)
            return
        match event:
            case Info(text=text):
                self.print_message(f"note: {text}")
            case Warning(text=text):
                self.print_message(f"warning: {text}")
            case Waiting(for_whom=whom):
                self.print_message(f"waiting for {whom}")
            case SourceFailed(locator=locator, what=what, corrupt=True):
                self.print_message(f"warning: {locator} {what}")
            case SourceFailed(locator=locator, what=what) if self.args.verbose:
                self.print_message(f"source failed: {locator}: {what}")
            case _:
                pass


def read_lock(path: str) -> Lockfile:
    """A lockfile named on the command line. Raises LockfileMissingError and the errors of reading."""
    try:
        return lockfiles.read(Path(path))[0]
    except FileNotFoundError:
        hint = "name a file that `modelstow lock` wrote"
        raise LockfileMissingError(f"there is no lockfile at {path}", hint=hint) from None


def event_row(event: Event, **more: object) -> str:
    """An event as one line of JSON, behind *more*."""
    row: dict[str, object] = {**more, "event": type(event).__name__}
    row |= {each.name: getattr(event, each.name) for each in fields(event)}
    return json.dumps(row, default=str)


def _path(text: str | None) -> Path | None:
    return Path(absolute_path(text)) if text else None


__all__ = ["Answer", "Session", "event_row", "read_lock"]
