"""The runtime: everything that writes, wired for one store and one lockfile. Loaded only when there is something to do."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from modelstow.backends import Registry, Source
from modelstow.backends.file import path_of
from modelstow.backends.registry import FACTORIES, scheme_of
from modelstow.cas import BlobStore, CancellationToken, locks, syscalls
from modelstow.cas.inventory import Inventory, tree_id
from modelstow.cas.links import Linker

from .apply import Executor
from .checkout.publisher import Publisher
from .desired import selectors
from .desired.lockfile import Lockfile, absolute
from .desired.mirrors import MirrorProvider, PrefixMirrors
from .errors import ApplyError, InvalidConfigError
from .events.bus import EventBus
from .events.events import Sink, Warning
from .events.progress import Meter, Progress
from .events.recorder import Recorder
from .events.report import Report
from .interop.push import Push, Pushed
from .paths import absolute_path
from .planning.planner import PendingWork
from .planning.state import Desired, DesiredTree, TreeKey
from .retention.collector import Collector
from .retention.preflight import Preflight
from .retention.registered import other_locks
from .retention.roots import LockfileRoot, TreeRoot
from .settings import Settings
from .state_dirs import BAD_SOURCES
from .transfer.concurrency import Connections
from .transfer.context import TransferContext
from .transfer.fetcher import Fetcher
from .transfer.group_commit import affordable_connections
from .transfer.retry import RetryPolicy
from .transfer.source_health import BadSources, FailureTable


@dataclass(frozen=True, slots=True, kw_only=True)
class Runtime:
    """The tools of one run. *free* returns the bytes that may still be written to the store's disk."""

    settings: Settings
    lock: Lockfile
    registry: Registry
    targets: Registry  # for what is written to
    failures: FailureTable
    retry: RetryPolicy
    token: CancellationToken
    free: Callable[[], int]
    events: EventBus
    mirrors: Sequence[MirrorProvider] = ()  # before those of the settings

    def reach(
        self,
        desired: Desired,
        work: PendingWork | None,
        *,
        progress: Progress | None = None,
    ) -> tuple[frozenset[TreeKey], Report, ApplyError | None]:
        """Make actual equal *desired*: the trees that changed, what was done, and what failed of it.

        Raises NoSpaceError, InvalidConfigError, Cancelled, OSError: what concerns all of it.
        """
        events, recorder, meter = EventBus(self.events), Recorder(), Meter(progress or (lambda done, total: None))
        events.subscribe(recorder)
        events.subscribe(meter)
        error: ApplyError | None = None
        try:
            changed = self._executor(events.emit).reach(desired, work)
        except ApplyError as failed:
            error, changed = failed, failed.changed
        events.call(meter, meter.finish)
        return changed, recorder.report(), error

    def _warn_of_lost_mirrors(self) -> None:
        """Warn of mirrors whose folder does not exist: a mistyped one would only ever hold nothing."""
        for mirror in self.settings.mirrors:
            place = absolute(mirror, self._base)
            if scheme_of(place) in ("", "file") and not os.path.isdir(path_of(place)):
                self.events.emit(Warning(text=f"there is no mirror at {path_of(place)}"))

    @property
    def _base(self) -> Path:
        """The folder that relative locators are relative to."""
        return (self.settings.manifest or self.settings.lockfile or Path.cwd()).parent

    def collector(self, *, exclusive: bool = False) -> Collector:
        """The garbage collector of this store; *exclusive*: no other process uses it."""
        return self._collector(self.settings.open_store(), self.events.emit, exclusive=exclusive)

    def push(self, url: str | os.PathLike[str], *, compress: bool, dry_run: bool, done: Pushed | None) -> Push:
        """A push into the mirror at *url*, yet to be run; *done* is filled as it goes."""
        place, token = os.fspath(url), CancellationToken(self.token)
        return Push(
            store=self.settings.open_store(),
            registry=self.targets,
            url=place if "://" in place else absolute_path(place),
            compress=compress,
            dry_run=dry_run,
            threads=self.settings.connections,
            policy=self.retry,
            token=token,
            pay=throttle(self.settings, token),
            emit=self.events.emit,
            done=Pushed() if done is None else done,
        )

    def recover(self, unfinished: Iterable[TreeRoot]) -> None:
        """Finish or undo changes of trees that did not end. Raises LockTimeoutError, OSError."""
        store = self.settings.open_store()
        store.prepare()
        for root in unfinished:
            self._publisher(store, self.events.emit).recover(root.key, root.record.path(store.layout.root))
        store.remove_temp_files()

    def remove_tree(self, record: Inventory, key: TreeKey) -> bool:
        """Remove one tree. Raises LockTimeoutError, OSError."""
        store = self.settings.open_store()
        store.prepare()
        return self._publisher(store, self.events.emit).remove(record, key)

    def _executor(self, emit: Sink) -> Executor:
        store = self.settings.open_store()
        token = CancellationToken(self.token)
        context = TransferContext(
            registry=self.registry,
            base=self._base,
            failures=self.failures,
            bad_sources=BadSources(store.layout.state_dir(BAD_SOURCES), writers=store.writers),
            emit=emit,
            mirrors=(*self.mirrors, *([PrefixMirrors(mirrors)] if (mirrors := self.settings.mirrors) else [])),
            connections=Connections(min(self.settings.useful_connections, affordable_connections())),
            limit_rate=self.settings.limit_rate,
            policy=self.retry,
            token=token,
        )

        preflight = Preflight(
            store=store,
            collector=self._collector(store, emit),
            free=self.free,
            emit=emit,
            min_free=self.settings.min_free,
            max_size=self.settings.max_size,
        )
        return Executor(
            store=store,
            fetcher=Fetcher(store=store, context=context),
            publisher=self._publisher(store, emit),
            emit=emit,
            token=token,
            lock_space=lambda: store.lock("space", doing="checking the space", token=self.token),
            checks=(
                lambda work: self._refuse_conflicts(store, work.trees),
                lambda work: self._warn_of_lost_mirrors() if work.missing else None,
                lambda work: preflight.make_room(work.plan),
            ),
        )

    def _publisher(self, store: BlobStore, emit: Sink) -> Publisher:
        linker = Linker(self.settings.link_mode, strict=self.settings.strict_links)

        def lock_tree(key: TreeKey) -> locks.Lock:
            name = f"tree-{tree_id(key.tree)}"
            return store.lock(name, doing=f"changing {key}", token=self.token)

        return Publisher(store=store, linker=linker, emit=emit, lock_tree=lock_tree)

    def _collector(self, store: BlobStore, emit: Sink, *, exclusive: bool = False) -> Collector:
        return Collector(
            store=store,
            remove_tree=self._publisher(store, emit).remove,
            free=self.free,
            in_use=syscalls.in_use,
            token=self.token,
            exclusive=exclusive,
        )

    def _refuse_conflicts(self, store: BlobStore, trees: Iterable[DesiredTree]) -> None:
        """Refuse to change a tree that another registered lockfile wants with other content."""
        others = other_locks(store, self.settings.lockfile, on_unreadable=lambda error: None)  # that stops gc alone
        inside = [id_ for tree in trees if not os.path.isabs(tree.key.tree) for id_ in tree.key.variants]
        for id_ in (id_ for id_ in inside if id_.model in self.lock.models):
            mine = selectors.fingerprint(self.lock.models[id_.model].variants[id_.variant])
            for other in others:
                if other.trees.get(id_, mine) != mine:
                    raise InvalidConfigError(
                        f"{id_} is locked with other content by {other.path}, which shares this store",
                        hint="give one of the two another version, or use another --root",
                    )


def transfer_ownership(settings: Settings, owners: Mapping[str, LockfileRoot]) -> None:
    """Make other lockfiles that name trees, by inventory, those that may remove them. Raises LockTimeoutError, OSError."""
    store = settings.open_store()
    for id_, owner in owners.items():
        with store.lock(f"tree-{id_}", doing="transferring a tree"):
            record = store.trees.read_file(store.layout.inventories / id_)
            if record is not None:
                store.trees.rewrite(replace(record, labels={**record.labels, "lockfile": owner.path}))


# ---- sources


def registry_of(settings: Settings, factories: Mapping[str, Callable[[], Source]] = FACTORIES) -> Registry:
    """The sources by the settings: offline, or with a rate limit."""
    if settings.limit_rate is None:
        return Registry(factories, offline=settings.offline)
    from modelstow.backends.throttle import RateBudget, ThrottledSource

    budget = RateBudget(settings.limit_rate)
    return Registry(factories, offline=settings.offline, wrap=lambda source: ThrottledSource(source, budget))


def targets_of(settings: Settings, factories: Mapping[str, Callable[[], Source]] = FACTORIES) -> Registry:
    """The upload targets by the settings, without a rate limit: a push throttles what it sends itself."""
    return Registry(factories, offline=settings.offline)


def throttle(settings: Settings, token: CancellationToken) -> Callable[[int], None]:
    """A rate limiter: called with a count of bytes before they are sent, it waits as long as the settings' rate asks for.

    A cancelled *token* ends the wait.
    """
    if settings.limit_rate is None:
        return lambda count: None
    from modelstow.backends.throttle import RateBudget

    return RateBudget(settings.limit_rate, sleep=token.wait).spend
