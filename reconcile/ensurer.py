"""The Python interface: one store, one lockfile, and every operation on the two."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from modelstow.backends import Registry, Source
from modelstow.backends.registry import FACTORIES
from modelstow.cas import BlobStore, CancellationToken, presence
from modelstow.cas.inventory import Inventory
from modelstow.cas.scrub import Level

from .desired.lockfile import Lockfile
from .desired.selectors import VariantId, all_variants, select
from .desired_state import EnsureOptions, blob_sizes, build, build_all
from .errors import from_os, single
from .events.bus import EventBus
from .events.report import Report
from .paths import absolute_path
from .planning.observer import free_bytes, observe
from .planning.planner import Plan, find_work, plan, statuses
from .planning.state import Actual, Desired, ModelState, TreeKey, VariantStatus
from .project import Project, find_files
from .results import ApplyResult, IntegrityReport, TreeResult
from .retention import registered, roots
from .settings import Settings, from_environment

if TYPE_CHECKING:  # what writes and reads content is loaded when there is something to do: start-up is performance
    from .desired.mirrors import MirrorProvider
    from .events.events import Sink
    from .events.progress import Progress
    from .interop.push import Pushed
    from .planning.verifier import VerifyReport
    from .retention.collector import EvictionTargets, GcResult
    from .runtime import Runtime
    from .transfer.retry import RetryPolicy
    from .transfer.source_health import FailureTable, SourceFailure


Selectors = Iterable[str | VariantId] | None
"""Variants as people type them, or as values; None: every variant of the lockfile."""


@dataclass(slots=True, kw_only=True, eq=False)
class ModelEnsurer:
    """The interface to the models of one lockfile in one store.

    Any number of threads may share one object; any number of processes and hosts may share one ROOT. Nothing is written
    before something has to be done.
    """

    settings: Settings
    lock: Lockfile
    lock_text: bytes = b""
    mirrors: Sequence[MirrorProvider] = ()  # asked for each blob before those of the settings
    factories: Mapping[str, Callable[[], Source]] = field(default_factory=lambda: FACTORIES)
    retry: RetryPolicy | None = None
    free_bytes: Callable[[], int] | None = None
    events: EventBus = field(default_factory=EventBus)  # of all its runs
    token: CancellationToken = field(default_factory=CancellationToken)
    failures: FailureTable | None = None  # made at the first request
    _registry: Registry | None = None

    @classmethod
    def open(
        cls,
        root: str | os.PathLike[str] | None = None,
        lockfile: str | os.PathLike[str] | None = None,
        *,
        settings: Settings | None = None,
        events: Sink | None = None,
        **more: object,
    ) -> ModelEnsurer:
        """Open with a root and a lockfile, or with whole *settings*.

        What is not given comes from the environment; files that are not named are looked for in the current folder and
        those above. The mirrors that the manifest next to the lockfile names are used. *events* is a first listener.

        Raises LockfileMissingError, LockfileInvalidError, SchemaVersionError, InvalidConfigError, OSError.
        """
        if settings is None:
            lock, manifest = find_files(lockfile, None, os.environ)
            given = {"root": _absolute(root), "lockfile": _absolute(lock), "manifest": _absolute(manifest)}
            settings = from_environment(os.environ, **given)
        project = Project(settings)
        settings = replace(settings, lockfile=project.path, mirrors=project.mirrors)
        ensurer = cls(settings=settings, lock=project.lock, lock_text=project.lock_text, **more)  # type: ignore[arg-type]
        if events is not None:
            ensurer.events.subscribe(events)
        for text in project.warnings:
            ensurer.events.warn(text)
        return ensurer

    @property
    def failed_sources(self) -> Mapping[str, SourceFailure]:
        """Sources that failed lately in this process, with when and why; they are tried last. Success clears them."""
        return self.failures.active() if self.failures is not None else {}

    def local_path(self, model: str, variant: str | None = None) -> Path:
        """The path of a variant's tree, existing or not; depends on ROOT and the selector alone. Raises as ``status``."""
        return self.settings.root / select(self.lock, model, variant).tree

    def desired(self, selectors: Selectors = None, *, options: EnsureOptions = EnsureOptions()) -> Desired:
        """The desired state of variants (default: all). Raises the errors of selectors."""
        if selectors is None and options.into is None:
            return build_all(self.settings, self.lock, options, self.events.warn)
        return build(self.settings, self.lock, self._chosen(selectors), options)

    def observe(self, desired: Desired | None = None) -> Actual:
        """The actual state of what *desired* names, by stat. Writes nothing, takes no lock, needs no network."""
        return observe(BlobStore.open_readonly(self.settings.root), desired or self.desired(), free=self._free)

    def plan(
        self,
        selectors: Selectors = None,
        *,
        options: EnsureOptions = EnsureOptions(),
        removals: bool = False,
        force: bool = False,
    ) -> Plan:
        """The plan for ``apply``; *removals*: also of trees that this lockfile no longer names; *force*: fetch all."""
        desired = self._wanted(selectors, options, force=force)
        if removals:
            found, _ = registered.removals(self.settings.root, self.settings.lockfile, desired, self.events.warn)
            desired = replace(desired, removals=found)
        return plan(desired, self.observe(desired))

    def status(self, model: str, variant: str | None = None) -> VariantStatus:
        """The state of one variant: by stat, without locks or network. Raises the errors of selectors, OSError."""
        return self.statuses([select(self.lock, model, variant)])[0]

    def statuses(self, selectors: Selectors = None) -> list[VariantStatus]:
        """The states of variants (default: all)."""
        desired = self.desired(selectors)
        return statuses(desired, self.observe(desired))

    def estimate_download_size(self, model: str, variant: str | None = None) -> int:
        """Bytes that are not on disk yet; 0 when in sync."""
        return self.status(model, variant).bytes_needed

    # ---- doing

    def ensure(
        self,
        model: str,
        variant: str | None = None,
        *,
        force_redownload: bool = False,
        progress_callback: Progress | None = None,
        into: str | os.PathLike[str] | None = None,
        with_: Iterable[str] = (),
        without: Iterable[str] = (),
    ) -> Path:
        """Ensure that a tree is complete; its path. Fetches what is missing, repairs what is damaged, removes nothing.

        Raises the errors of selectors before anything is touched; ChecksumError, SizeMismatchError,
        SourceUnavailableError and its kin, NoSpaceError, LockTimeoutError, OSError.
        """
        chosen = select(self.lock, model, variant)
        options = EnsureOptions(into=_absolute(into), with_=frozenset(with_), without=frozenset(without))
        outcome = self.ensure_all([chosen], force=force_redownload, options=options, progress=progress_callback)
        if outcome.error is not None:
            raise single(outcome.error)
        return outcome.trees[0].path

    def ensure_all(
        self,
        selectors: Selectors,
        *,
        force: bool = False,
        options: EnsureOptions = EnsureOptions(),
        progress: Progress | None = None,
    ) -> ApplyResult:
        """Ensure several variants; one's failure stops no other. Raises what concerns all of them."""
        desired = self._wanted(selectors, options, force=force)
        outcome = self._apply(desired, progress=progress)
        self._record_use(desired)
        return outcome

    def reconcile(self, *, prune: bool = False, progress: Progress | None = None) -> ApplyResult:
        """Make the disk equal the whole lockfile, then remove the trees that it put there and no longer names."""
        began_ns = time.time_ns()
        desired = self.desired(options=EnsureOptions(prune=prune))
        removals, new_owners = registered.removals(self.settings.root, self.settings.lockfile, desired, self.events.warn)
        actual = self.observe(desired)
        outcome = self._apply(replace(desired, removals=removals), actual, progress=progress)
        if outcome.error is None:
            if new_owners:
                from .runtime import transfer_ownership

                transfer_ownership(self.settings, new_owners)
            self._register()
            self._record_use(desired)
            if not prune and not removals and not any(tree.changed for tree in outcome.trees):
                from . import snapshot_writer

                snapshot_writer.take(self.settings, self.lock, self.lock_text, desired, actual, began_ns)
        return outcome

    def apply(self, work: Plan) -> Report:
        """Carry out a plan, after another observation. Raises ApplyError when parts failed."""
        outcome = self._apply(work.desired)
        if outcome.error is not None:
            raise outcome.error
        return outcome.report

    def verify_integrity(self, model: str, variant: str | None = None, *, level: Level = Level.FULL) -> IntegrityReport:
        """Read one variant's content. Raises the errors of selectors, OSError; bad content is in the report."""
        desired = self.desired([select(self.lock, model, variant)])
        tree = desired.trees[0]
        store = BlobStore.open_readonly(self.settings.root)
        if not observe(store, desired).trees[tree.key].exists:
            return IntegrityReport.absent(tree)
        from .planning import verifier

        found = verifier.audit(store, desired, level)
        return IntegrityReport.of(tree, {path for fault in found.faults for path in fault.paths})

    def verify(
        self, selectors: Selectors, level: Level, *, repair: bool = False
    ) -> tuple[VerifyReport, ApplyResult | None]:
        """Read the content of variants, or of every blob and registered tree; with *repair*, repair what is damaged.

        The second result is the repair's; None where none was needed or requested.
        """
        from .events.progress import Task
        from .planning import verifier

        store = BlobStore.open_readonly(self.settings.root)
        named = None if selectors is None else self.desired(selectors)
        if repair and (left := registered.unfinished(store, named, self.events.warn)):
            self._runtime().recover(left)
        desired, others = (named, {}) if named else registered.everything(store, self.lock, self.events.warn)
        with Task("verifying", self.events.emit) as task:
            found = verifier.audit(store, desired, level, other_blobs=others, on_begin=task.begin, on_bytes=task.advance)
        if not repair or not found.faults:
            return found, None
        orphans = frozenset(f.digest for f in found.faults if f.kind == "corrupt") & self.lock.blobs.keys()
        return found, self._apply(replace(registered.repairable(self.lock, desired), extra_blobs=orphans))

    def collect_garbage(
        self,
        *,
        dry_run: bool = False,
        goals: EvictionTargets | None = None,
        quarantine: bool = False,
        state_lost: bool = False,
        exclusive: bool = False,
    ) -> GcResult:
        """Remove blobs that nothing keeps; with *goals* evict trees too.

        Raises StoreStateError (nothing was deleted), LockTimeoutError, OSError.
        """
        from .retention.collector import EvictionTargets, GcResult

        if BlobStore.open_existing(self.settings.root) is None:
            return GcResult(dry_run=dry_run)
        collector = self._runtime().collector(exclusive=exclusive)
        return collector.collect(goals or EvictionTargets(), dry_run=dry_run, quarantine=quarantine, state_lost=state_lost)

    def push(
        self,
        selectors: Selectors,
        url: str | os.PathLike[str],
        *,
        compress: bool = False,
        dry_run: bool = False,
        done: Pushed | None = None,
    ) -> Pushed:
        """Publish the blobs of variants (None: of all), optional parts too, to a mirror: a folder, or s3://bucket/prefix.

        *done* is filled as blobs are published, so that it is known after an error. Raises the errors of selectors,
        InvalidConfigError, IntegrityError, SourceError, Cancelled, OSError.
        """
        sizes = blob_sizes(self.lock, self._chosen(selectors))
        return self._runtime().push(url, compress=compress, dry_run=dry_run, done=done).run(sizes)

    @contextmanager
    def lease(self, model: str, variant: str | None = None) -> Iterator[Path]:
        """Ensure a variant and keep it from eviction and garbage collection while the block runs.

        Raises the errors of ``ensure``; PermissionDeniedError for a store that cannot be written to.
        """
        from modelstow.cas import leases

        self.ensure(model, variant)
        desired = self.desired([select(self.lock, model, variant)])
        digests = frozenset(desired.trees[0].files.values())
        try:
            held = leases.take(self.settings.open_store(), doing=f"using {desired.trees[0].key}", digests=digests)
        except OSError as error:
            raise from_os(error, "taking a lease") from error
        try:
            # Again, now that nothing may remove it: it may have been evicted before the lease was there.
            yield self.ensure(model, variant)
        finally:
            held.finish()

    # ---- what is wanted

    def _chosen(self, selectors: Selectors) -> list[VariantId]:
        selectors = all_variants(self.lock) if selectors is None else selectors
        return list(dict.fromkeys(s if isinstance(s, VariantId) else select(self.lock, s) for s in selectors))

    def _register(self) -> None:
        """Register the lockfile, unless it is registered with this content."""
        store = BlobStore.open_readonly(self.settings.root)
        root = registered.lock_root(self.lock, self.settings.lockfile, self.lock_text)
        if any(store.layout.leases.glob("*")):  # what `lock` had pulled is kept by the lockfile now
            from modelstow.cas import leases

            leases.drop_superseded(store, root.digests)
        if roots.read_lockfile_root(store, Path(root.path)) == root and roots.epoch(store) == store.config.epoch:
            return
        store = self.settings.open_store()
        store.prepare()
        roots.register_lockfile(store, root)

    # ---- making it so

    def _wanted(self, selectors: Selectors, options: EnsureOptions, *, force: bool) -> Desired:
        desired = self.desired(selectors, options=options)
        return replace(desired, force_refetch=desired.digests) if force else desired

    def _apply(self, desired: Desired, actual: Actual | None = None, *, progress: Progress | None = None) -> ApplyResult:
        """Observe without a lease first (*actual*, if that was done); only with work to do, do it.

        Where a tree is not there at all there is work for certain, and it is observed under the lease alone.
        """
        absent = actual is None and any(not presence.exists(tree.path) for tree in desired.trees)
        work = None if absent else find_work(desired, actual or self.observe(desired))
        if work is not None and not work.trees and not work.missing and not desired.removals:
            if progress is not None:
                progress(0, 0)
            return ApplyResult(trees=tuple(self._outcomes(desired, frozenset(), failed=False)), report=Report())
        changed, report, error = self._runtime().reach(desired, work, progress=progress)
        trees = tuple(self._outcomes(desired, changed, failed=error is not None))
        return ApplyResult(trees=trees, report=report, error=error)

    def _outcomes(self, desired: Desired, changed: frozenset[TreeKey], *, failed: bool) -> Iterator[TreeResult]:
        found = statuses(desired, self.observe(desired)) if failed else []
        states = {status.local_path: status.state for status in found}
        for tree in desired.trees:
            state, is_changed = states.get(tree.path, ModelState.COMPLETE), tree.key in changed
            for id_ in tree.key.variants:
                yield TreeResult(model=id_.model, variant=id_.variant, path=tree.path, state=state, changed=is_changed)

    def _runtime(self) -> Runtime:
        from .runtime import Runtime, targets_of
        from .transfer.retry import RetryPolicy

        return Runtime(
            settings=self.settings,
            lock=self.lock,
            registry=self._sources(),
            targets=targets_of(self.settings, self.factories),
            failures=self._failure_table(),
            retry=self.retry or RetryPolicy(),
            token=self.token,
            free=self._free,
            events=self.events,
            mirrors=self.mirrors,
        )

    def remove_tree(self, record: Inventory, key: TreeKey) -> bool:
        """Remove one tree, as ``evict`` does. Raises LockTimeoutError, OSError."""
        return self._runtime().remove_tree(record, key)

    def _failure_table(self) -> FailureTable:
        from .transfer.source_health import FailureTable

        self.failures = self.failures or FailureTable()
        return self.failures

    def _sources(self) -> Registry:
        if self._registry is None:
            from .runtime import registry_of

            self._registry = registry_of(self.settings, self.factories)
        return self._registry

    def _free(self) -> int:
        return self.free_bytes() if self.free_bytes is not None else free_bytes(self.settings.root)

    def _record_use(self, desired: Desired) -> None:
        """Record the use of trees, for eviction; a read-only store keeps no such record."""
        BlobStore.open_readonly(self.settings.root).trees.touch(tree.key.tree for tree in desired.trees)


def _absolute(path: str | os.PathLike[str] | None) -> Path | None:
    return None if path is None else Path(absolute_path(path))
