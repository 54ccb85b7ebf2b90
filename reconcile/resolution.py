"""The `lock` command: manifest in, lockfile out. The only writer of models.lock."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from modelstow.cas import CancellationToken, CasError
from modelstow.cas.durable import write_file
from modelstow.cas.layout import Layout

from .desired import lockfile as lockfiles
from .desired import manifest as manifests
from .desired.listed_files import LockWarning
from .desired.lockfile import Lockfile
from .desired.resolver import resolve
from .desired.validation import ModelId
from .errors import ModelNotFoundError, listing
from .events.bus import EventBus
from .project import find_manifest
from .runtime import registry_of
from .settings import Settings
from .state_dirs import BAD_SOURCES
from .transfer.context import TransferContext
from .transfer.prefetch import Prefetcher
from .transfer.retry import RetryPolicy, RetrySchedule, with_retries
from .transfer.source_health import BadSources, FailureTable


@dataclass(frozen=True, slots=True, kw_only=True)
class LockResult:
    """The result of locking. ``files`` counts paths of all variants, ``bytes`` each blob once."""

    path: Path
    lock: Lockfile
    changed: bool
    warnings: tuple[LockWarning, ...] = ()  # what was left out, or cannot be vouched for

    @property
    def files(self) -> int:
        return sum(len(v.files) for model in self.lock.models.values() for v in model.variants.values())

    @property
    def bytes(self) -> int:
        return sum(blob.size for blob in self.lock.blobs.values())


def lock(
    settings: Settings,
    *,
    upgrade: str | None = None,
    write: bool = True,
    retry: RetryPolicy = RetryPolicy(),
    events: EventBus | None = None,
    token: CancellationToken | None = None,
) -> LockResult:
    """Resolve the manifest. *upgrade*: list the models of this name again, "" for all. Without *write* nothing is kept.

    The lockfile is replaced in one step and only if its text changes. Raises ManifestValidationError,
    LockfileInvalidError, SourceUnavailableError, AuthError, NoSpaceError, OSError.
    """
    path, run = find_manifest(settings), CancellationToken(token)
    target = settings.lockfile or path.with_suffix(".lock")
    manifest = manifests.read(path)
    previous, text = _previous(target)
    context = TransferContext(
        registry=registry_of(settings),
        base=path.parent,
        failures=FailureTable(),
        bad_sources=BadSources(Layout(settings.root).state_dir(BAD_SOURCES)),
        emit=(events or EventBus()).emit,
        policy=retry,
        token=run,
    )
    if upgrade and not any(_is_named(upgrade, model.id) for model in manifest.models.values()):
        names = sorted(manifest.models)
        raise ModelNotFoundError(f"{upgrade} is not in {path}; models: {listing(names)}", available_models=names)
    prefetcher = Prefetcher(
        store=settings.open_store,
        context=context,
        threads=settings.connections,
    )
    warnings: dict[LockWarning, None] = {}
    try:
        found = resolve(
            manifest,
            previous,
            registry=context.registry,
            with_retries=lambda ask: with_retries(ask, _interactive(context.policy), run),
            prefetcher=prefetcher,
            upgrade=_upgrades(upgrade),
            warn=warnings.setdefault,
        )
    except BaseException:
        if write:
            with suppress(CasError, OSError):  # this is not what went wrong
                prefetcher.keep()  # what was named need not be fetched again
        raise
    fresh = found.format().encode()
    changed = fresh != text
    if write:
        prefetcher.keep()
        if changed:
            write_file(target, fresh)
    return LockResult(path=target, lock=found, changed=changed, warnings=tuple(warnings))


def is_stale(settings: Settings) -> bool:
    """Whether the lockfile is missing or was made from another manifest. Asks no source. Raises as ``lock``."""
    manifest = manifests.read(find_manifest(settings))
    previous, _ = _previous(settings.lockfile or manifest.path.with_suffix(".lock"))
    return previous is None or previous.manifest != manifest.meaning


def read_lockfile(settings: Settings) -> LockResult:
    """The existing lockfile, for its figures. Raises LockfileInvalidError, OSError."""
    path = settings.lockfile or find_manifest(settings).with_suffix(".lock")
    previous, _ = _previous(path)
    empty = Lockfile(manifest="", models={}, blobs={})
    return LockResult(path=path, lock=previous or empty, changed=False)


def _previous(path: Path) -> tuple[Lockfile | None, bytes]:
    try:
        return lockfiles.read(path)
    except FileNotFoundError:
        return None, b""


def _upgrades(upgrade: str | None) -> Callable[[ModelId], bool]:
    if upgrade is None:
        return lambda id_: False
    return lambda id_: not upgrade or _is_named(upgrade, id_)


def _is_named(text: str, id_: ModelId) -> bool:
    return text in (id_.name, str(id_))


def _interactive(policy: RetryPolicy) -> RetryPolicy:
    """For listings: a person waits for them, and nothing is lost by running `lock` again."""

    def few(backoff: RetrySchedule) -> RetrySchedule:
        return replace(backoff, attempts=min(backoff.attempts, 3), longest_s=min(backoff.longest_s, 5.0))

    return replace(policy, transient=few(policy.transient), rate_limit=few(policy.rate_limit), retry_after_cap_s=10.0)
