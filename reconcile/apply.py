"""The executor: lease, observe, plan, make room, fetch, publish, remove. It is level-triggered.

The plan that is carried out is made here, of what is observed under the lease. So a stale plan is safe, and running
again after anything continues from what is verified. One variant's failure stops no other; nothing is removed if something
failed.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field, replace

from modelstow.cas import (
    EMPTY,
    BlobState,
    BlobStatus,
    BlobStore,
    CancellationToken,
    CasError,
    Digest,
    StoreStateError,
    leases,
    sweep,
)
from modelstow.cas.layout import TABLE_FROM
from modelstow.cas.leases import Lease

from .checkout.publisher import Publisher
from .errors import ApplyError, ApplyFailure, FilesystemError, ModelstowError, as_ours, listing
from .events.events import BlobsReused, FetchesPlanned, Sink, Warning
from .planning.observer import observe
from .planning.planner import Fetch, PendingWork, Plan, find_work
from .planning.state import NO_TREE, Actual, Desired, DesiredTree, TreeKey
from .transfer.concurrency import IdleDetector
from .transfer.context import STOPPED
from .transfer.fetcher import Fetcher
from .transfer.pool import POLL_S, WorkerPool
from .transfer.state import BlobRequest

_GROW_S = 0.02  # how often another worker is thought of


Check = Callable[[PendingWork], None]
"""Looks at work before it begins. What it raises refuses all of it, and then nothing was changed."""


@dataclass(slots=True, kw_only=True)
class Executor:
    """The executor for one store. Its *checks* are called in order under the lease, before the first byte."""

    store: BlobStore
    fetcher: Fetcher
    publisher: Publisher
    emit: Sink
    token: CancellationToken  # of this run, a child of the caller's: cancelled when it ends badly, so that its threads end
    lock_space: Callable[[], AbstractContextManager[object]] = nullcontext
    checks: Sequence[Check] = ()
    _failures: list[ApplyFailure] = field(default_factory=list)
    _failed_trees: set[TreeKey] = field(default_factory=set)  # with a blob that could not be fetched

    def reach(self, desired: Desired, work: PendingWork | None) -> frozenset[TreeKey]:
        """Make actual equal *desired*; the trees that changed. Durable on return.

        *work*: what an observation without a lease found; None where none was made, since trees are not there at all.
        Raises ApplyError when parts failed (the rest is done), NoSpaceError before the first byte, Cancelled, OSError.
        """
        seen_commits = {digest: self.store.commits_seen(digest) for digest in desired.force_refetch}
        trees = desired.trees if work is None else work.trees
        self.store.prepare()
        self._failures, self._failed_trees = [], set()
        changed: set[TreeKey] = set()
        lease, actual, work = self._begin(replace(desired, trees=trees), work.missing if work else {})
        with_work = replace(desired, trees=work.trees)
        done = False
        try:
            replaced = self._fetch_missing(with_work, actual, work.plan, seen_commits)
            # What was seen intact under the lease still is; what was just fetched is looked at.
            known = {digest: status for digest, status in actual.blobs.items() if status.state is BlobState.INTACT}
            known = {digest: status for digest, status in known.items() if digest not in replaced}
            for tree in work.trees:
                if self._publish(with_work, tree, known):
                    changed.add(tree.key)
            self._relink_others(with_work, replaced)
            self._remove(desired)
            done = not self._failures
        finally:
            self._end(lease, with_work, finished=done)
        if self._failures:
            raise ApplyError(self._failures, frozenset(changed))
        return frozenset(changed)

    # ---- before

    def _begin(self, desired: Desired, missing: Mapping[Digest, int]) -> tuple[Lease, Actual, PendingWork]:
        """Lease, then observe and plan: from here on no sweep removes what is seen. Then see that there is room.

        *missing*: sizes of what will have to be fetched, as far as that is known.
        """
        # Reserving room and checking for it are one step, or two runs that start together would refuse each other.
        with self.lock_space() if missing else nullcontext():
            lease = self._lease(desired, missing)
            try:
                actual = observe(self.store, desired)
                work = find_work(desired, actual)
                unreserved = bool(work.missing) and not missing
                with self.lock_space() if unreserved else nullcontext():
                    if unreserved:
                        lease.reserve(work.missing)
                    for check in self.checks:
                        check(work)
                # Leases of dead runs for the same blobs: every later reader would have to decode each of them.
                if leases.drop_superseded(self.store, desired.digests):
                    self.store.sync_blobs()  # such a run may have ended between the names of its blobs and their sync
                self._announce(work.plan)
            except BaseException:
                lease.finish()  # nothing was begun that would have to be kept
                raise
        return lease, actual, work

    def _announce(self, fresh: Plan) -> None:
        fetches = [action for action in fresh.actions if isinstance(action, Fetch)]
        if fetches:
            total, held = sum(fetch.size for fetch in fetches), sum(fetch.have for fetch in fetches)
            self.emit(FetchesPlanned(blobs=len(fetches), bytes=total, held=held))

    def _lease(self, desired: Desired, reserved: Mapping[Digest, int]) -> Lease:
        lease = leases.take(self.store, doing="reconcile", digests=desired.digests, reserved=reserved, token=self.token)
        self.fetcher.before_commit = lease.renew
        return lease

    # ---- blobs

    def _fetch_missing(
        self, desired: Desired, actual: Actual, fresh: Plan, seen_commits: Mapping[Digest, str]
    ) -> frozenset[Digest]:
        """Carry out the plan's fetches, and read what is available locally; the blobs whose inode is another now."""
        requested = fresh.local.union(action.digest for action in fresh.actions if isinstance(action, Fetch))
        reused = desired.digests - requested
        self.emit(BlobsReused(blobs=len(reused), bytes=sum(map(desired.size, reused))))
        if not requested:
            return frozenset()
        paths: dict[Digest, list[str]] = {}
        names: dict[Digest, str] = {}
        for tree in desired.trees:
            for path, digest in tree.files.items():
                if digest in requested:
                    paths.setdefault(digest, []).append(path)
                    names.setdefault(digest, f"{tree.key}  {path}" if len(desired.trees) > 1 else path)
        local_candidates = self._local_candidates(desired, actual)
        requests = []
        for digest in requested:
            blob = BlobRequest(
                digest=digest,
                size=desired.size(digest),
                urls=desired.blobs[digest].urls,
                paths=tuple(dict.fromkeys(paths.get(digest, ()))),
                name=names.get(digest, digest.short),
                local_candidates=tuple(local_candidates.get(digest, ())),
                force_refetch=digest in seen_commits,
                seen_commit=seen_commits.get(digest, ""),
            )
            requests.append(blob)
        # By the end of the digest: those with one beginning share a lock, and would wait for each other.
        requests.sort(key=lambda blob: (-blob.size, blob.digest[::-1]))
        return self._obtain_all(desired, requests)

    def _local_candidates(self, desired: Desired, actual: Actual) -> dict[Digest, list[str]]:
        """Files of trees that may hold a blob's bytes in another inode."""
        found: dict[Digest, list[str]] = {}
        for tree in desired.trees:
            seen = actual.trees.get(tree.key, NO_TREE)
            for path in (*seen.foreign, *seen.placed):
                digest = tree.files.get(path)
                if digest is None or actual.blob(digest) is BlobState.INTACT:
                    continue
                foreign, blob = seen.foreign.get(path), actual.blobs.get(digest)
                if foreign is not None and not foreign.could_match(desired.size(digest)):
                    continue
                with suppress(OSError):
                    if os.lstat(tree.path / path).st_ino != (blob.ino if blob else 0):
                        found.setdefault(digest, []).append(str(tree.path / path))
        return found

    def _obtain_all(self, desired: Desired, requests: list[BlobRequest]) -> frozenset[Digest]:
        """Fetch blobs by several workers, largest first, so that none is left alone at the end; one takes the smallest.

        Two at once where there are large ones, and more as long as this process has time to spare: they help against a
        network that answers late. Small ones are Python's own work, and two threads of it only wait for each other.
        """
        at_once = 2 if requests[0].size > TABLE_FROM else 1
        queue, replaced, failed = deque(requests), set[Digest](), dict[Digest, ModelstowError | CasError]()
        connections, idle = self.fetcher.context.connections, IdleDetector(one_works=at_once == 1)

        def work(smallest: bool) -> None:
            idle.watch_this_thread()
            try:
                for digest, outcome in self.fetcher.obtain_all(self._taken(queue, smallest=smallest)).items():
                    if isinstance(outcome, Exception):
                        failed[digest] = _ours(outcome)
                    elif outcome:
                        replaced.add(digest)
            finally:
                connections.give()

        most, workers = min(connections.most, len(requests)), 0
        with WorkerPool(most, "fetch", token=self.token, cancelled=STOPPED) as pool:
            while pool.busy or not workers:
                while queue and (workers < at_once or idle.seen()) and connections.take():
                    pool.start(work, workers == 1)
                    workers += 1
                pool.wait(_GROW_S if queue and workers < connections.most else POLL_S)
                self.fetcher.commit_due()
        self._note_failures(desired, failed)
        return frozenset(replaced)

    def _taken(self, queue: deque[BlobRequest], *, smallest: bool) -> Iterator[BlobRequest]:
        """The blobs for one worker, from one end of a queue that others take from too."""
        with suppress(IndexError):
            while not self.token.cancelled:
                yield queue.pop() if smallest else queue.popleft()

    def _note_failures(self, desired: Desired, failed: Mapping[Digest, ModelstowError | CasError]) -> None:
        reported: set[Digest] = set()
        for tree in desired.trees:
            for digest in sorted(failed.keys() & set(tree.files.values())):
                reported.add(digest)
                self._failed_trees.add(tree.key)
                self._failures.append(ApplyFailure(str(tree.key), failed[digest]))
        self._failures += [ApplyFailure(digest.short, failed[digest]) for digest in sorted(failed.keys() - reported)]

    # ---- trees

    def _publish(self, desired: Desired, tree: DesiredTree, known: Mapping[Digest, BlobStatus]) -> bool:
        if tree.key in self._failed_trees:
            return False
        try:
            return self.publisher.publish(desired, tree, known)
        except (ModelstowError, CasError, OSError) as error:
            if self.token.cancelled:
                raise
            self._failures.append(ApplyFailure(str(tree.key), self._swept(desired, tree, error) or _ours(error)))
            return False

    def _swept(self, desired: Desired, tree: DesiredTree, error: Exception) -> ModelstowError | None:
        """The error where blobs are gone: this process was suspended until its lease ended, and gc ran."""
        if not isinstance(error, FileNotFoundError):
            return None
        blobs = self.store.blobs.stat_all({digest: desired.size(digest) for digest in {*tree.files.values()} - {EMPTY}})
        gone = [digest.short for digest, status in blobs.items() if status.state is BlobState.ABSENT]
        if not gone:
            return None
        what = f"{listing(gone)} of {tree.key} went from the store while this process slept"
        return FilesystemError(what, hint="run the same command again: what is gone is fetched again")

    def _relink_others(self, desired: Desired, replaced: frozenset[Digest]) -> None:
        """Link the new inodes of repaired blobs into trees outside *desired*, which would keep the damaged ones."""
        if not replaced:
            return
        mine = {tree.key.tree for tree in desired.trees}
        for file in self.store.trees.files():
            try:
                record = self.store.trees.read_file(file)
            except StoreStateError as error:
                self.emit(Warning(text=f"{error}; if it holds damaged files, they stay"))
                continue
            if record is None or record.tree in mine or not any(f.digest in replaced for f in record.files.values()):
                continue
            try:
                self.publisher.relink(desired, record, replaced)
            except (ModelstowError, CasError, OSError) as error:
                self._failures.append(ApplyFailure(record.tree, _ours(error)))

    def _remove(self, desired: Desired) -> None:
        if self._failures:
            return
        for key in desired.removals:
            record = self.store.trees.read(key.tree)
            if record is not None:
                self.publisher.remove(record, key)

    # ---- after

    def _end(self, lease: Lease, desired: Desired, *, finished: bool) -> None:
        """Remove the lease, since other roots keep everything now; or leave it as the root of unfinished work."""
        self.fetcher.before_commit = lambda: None
        if not finished:
            lease.close()
            return
        lease.finish()
        self.store.remove_temp_files()
        sweep.end_commits(self.store)


def _ours(error: BaseException) -> ModelstowError | CasError:
    return as_ours(error) or ModelstowError(f"{type(error).__name__}: {error}", hint="this is a bug")
