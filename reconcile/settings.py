"""Settings from the command line, the environment and defaults, in this order; and the parsers of their values."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from modelstow.backends import redact
from modelstow.backends.environment import env_flag
from modelstow.cas import BlobStore, LinkMode
from modelstow.cas.store import LOCK_TIMEOUT_S

from .desired.locators import check_source, normalize
from .errors import InvalidConfigError
from .paths import absolute_path

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
_MOST_BYTES, _DIGITS = 1e18, 9
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]i?)?b?(?:/s)?\s*\Z", re.IGNORECASE)
_AGES = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 7 * 86_400}
_AGE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([smhdw])\s*\Z", re.IGNORECASE)

CONNECTIONS = 8
_LEAST_SHARE = 64 * 1024  # bytes a second


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The settings of a run. Paths are absolute."""

    root: Path
    lockfile: Path | None = None
    manifest: Path | None = None
    mirrors: tuple[str, ...] = ()  # places that hold blobs by digest; tried first, always verified
    locked: bool = False
    offline: bool = False
    link_mode: LinkMode = LinkMode.AUTO
    strict_links: bool = False
    connections: int = CONNECTIONS
    limit_rate: float | None = None  # bytes a second
    lock_timeout_s: float = LOCK_TIMEOUT_S
    max_size: int | None = None  # bytes of blobs; None: no limit
    min_free: int = 0  # bytes to leave on the disk

    def open_store(self) -> BlobStore:
        """The store at ``root``, for writing. Raises StoreFormatError, OSError."""
        return BlobStore.open(self.root, lock_timeout_s=self.lock_timeout_s)

    @property
    def useful_connections(self) -> int:
        """The number of connections to use: with too small a share of ``limit_rate`` each would look stalled."""
        if self.limit_rate is None:
            return self.connections
        return max(1, min(self.connections, int(self.limit_rate // _LEAST_SHARE)))


def parse_size(text: str, what: str = "size") -> int:
    """The bytes in a text like ``50MB``, ``1.5GiB`` or ``1000``. Raises InvalidConfigError."""
    match = _SIZE.match(text)
    if match is None:
        raise InvalidConfigError(f"{what} {text!r} is not a size", hint="write it like 500GB, 1.5GiB or 1000000")
    size = float(match[1]) * _UNITS[(match[2] or "").lower()]
    if size >= _MOST_BYTES:
        raise InvalidConfigError(f"{what} {text[:40]!r} is more than any disk has", hint="write it like 500GB")
    return int(size)


def parse_age(text: str, what: str = "age") -> float:
    """The seconds in a text like ``30d`` or ``12h``. Raises InvalidConfigError."""
    match = _AGE.match(text)
    if match is None:
        raise InvalidConfigError(f"{what} {text!r} is not an age", hint="write it like 30d, 12h or 45m")
    return float(match[1]) * _AGES[match[2].lower()]


def parse_link_mode(text: str) -> LinkMode:
    """The link mode of that name, in any case. Raises InvalidConfigError."""
    try:
        return LinkMode(text.lower())
    except ValueError:
        modes = ", ".join(LinkMode)
        raise InvalidConfigError(f"{text!r} is not a link mode", hint=f"choose one of {modes}") from None


def parse_count(text: str, what: str) -> int:
    """A whole number from 1. Raises InvalidConfigError."""
    if not text.isascii() or not text.isdigit() or len(text) > _DIGITS or int(text) < 1:
        raise InvalidConfigError(f"{what} {text!r} is not a whole number from 1")
    return int(text)


def parse_seconds(text: str, what: str) -> float:
    """A time in seconds, from 0. Raises InvalidConfigError."""
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < 1e9:
        raise InvalidConfigError(f"{what} {text!r} is not a number of seconds from 0")
    return seconds


def parse_mirrors(text: str, what: str) -> tuple[str, ...]:
    """The locators in a text that separates them by spaces or commas. Raises InvalidConfigError."""
    mirrors = tuple(text.replace(",", " ").split())
    for mirror in mirrors:
        if problem := check_source(mirror):
            hint = problem.hint or "name a folder or an address that holds blobs by digest"
            raise InvalidConfigError(f"{what}: {redact(mirror)}: {problem.what}", hint=hint)
    return tuple(map(normalize, mirrors))


def default_root(environ: Mapping[str, str]) -> Path:
    """The store where none is named: MODELSTOW_ROOT, MODELS_ROOT, or the user's data folder."""
    if root := environ.get("MODELSTOW_ROOT") or environ.get("MODELS_ROOT"):
        return Path(absolute_path(root))
    if data := environ.get("XDG_DATA_HOME"):
        return Path(absolute_path(data)) / "modelstow"
    import platformdirs

    try:
        found = platformdirs.user_data_dir("modelstow", appauthor=False)
    except RuntimeError:  # neither HOME nor an entry in the password database
        found = "~"
    if found.startswith("~"):
        raise InvalidConfigError("it is not known where the store is", hint="set MODELSTOW_ROOT or HOME, or give --root")
    return Path(found)


def from_environment(environ: Mapping[str, str], **given: object) -> Settings:
    """Settings from the environment; fields that are *given* (and not None) win. Raises InvalidConfigError."""
    fields: dict[str, object] = {}
    for name, field in (("MODELSTOW_LOCK", "lockfile"), ("MODELSTOW_MANIFEST", "manifest")):
        if value := environ.get(name):
            fields[field] = Path(absolute_path(value))
    if value := environ.get("MODELSTOW_LINK_MODE"):
        fields["link_mode"] = parse_link_mode(value)
    if value := environ.get("MODELSTOW_CONCURRENCY"):
        fields["connections"] = parse_count(value, "MODELSTOW_CONCURRENCY")
    if value := environ.get("MODELSTOW_MAX_SIZE"):
        fields["max_size"] = parse_size(value, "MODELSTOW_MAX_SIZE")
    if value := environ.get("MODELSTOW_MIN_FREE"):
        fields["min_free"] = parse_size(value, "MODELSTOW_MIN_FREE")
    if value := environ.get("MODELSTOW_MIRRORS"):
        fields["mirrors"] = parse_mirrors(value, "MODELSTOW_MIRRORS")
    if env_flag(environ, "MODELSTOW_OFFLINE") or env_flag(environ, "HF_HUB_OFFLINE"):
        fields["offline"] = True
    fields |= {key: value for key, value in given.items() if value is not None}
    if "root" not in fields:
        fields["root"] = default_root(environ)
    return Settings(**fields)  # type: ignore[arg-type]  # every value above was parsed into its field's type
