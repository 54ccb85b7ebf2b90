"""`plan`, `reconcile`, `ensure`, `status`, `verify`: the commands about what is on disk."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelstow.cas import Cancelled, Entry, entries
from modelstow.cas.scrub import Level

from .. import documents, settings
from ..desired_state import EnsureOptions
from ..errors import IntegrityError, InvalidConfigError, as_ours
from ..events.report import Report, link_counts
from ..paths import absolute_path
from ..planning.planner import Action, Fetch, Link, LinkTree, Plan, Remove, Replace
from ..planning.state import ModelState, VariantStatus
from ..results import ApplyResult, TreeResult
from . import output
from .output import count, dump, seconds, size, table
from .progress import progress_shown
from .session import Answer, Session

if TYPE_CHECKING:
    from ..planning.verifier import Finding, VerifyReport

# ---- plan


def run_plan(session: Session) -> Answer:
    everything = not session.args.selectors
    plan = session.ensurer().plan(session.args.selectors or None, removals=everything)
    return plan_answer(plan, check=session.args.check)


def plan_answer(plan: Plan, *, check: bool = False) -> Answer:
    """A plan as an answer; exit code 3 if *check* finds work."""
    s = plan.summary
    summary = documents.plan_summary(
        fetch_blobs=s.fetch_blobs,
        fetch_bytes=s.fetch_bytes,
        link_files=s.link_files,
        remove_files=s.remove_files,
        disk_bytes=s.disk_bytes,
        free_bytes=s.free_bytes,
    )
    document = documents.plan([row for action in plan.actions for row in _rows(action)], summary)
    return Answer(document=document, lines=tuple(_plan_lines(plan)), code=3 if check and plan.changes else 0)


def _rows(action: Action) -> list[dict[str, Any]]:
    return [_action(link) for link in action.links()] if isinstance(action, LinkTree) else [_action(action)]


def _action(action: Fetch | Link | Replace | Remove) -> dict[str, Any]:
    match action:
        case Fetch():
            return {"do": "fetch", "digest": action.digest, "size": action.size, "have": action.have, "url": action.url}
        case Link() | Replace():
            do = "link" if isinstance(action, Link) else "replace"
            return {"do": do, **_place(action), "digest": entries.digest_of(action.entry)}
        case Remove():
            return {"do": "remove", **_place(action)}


def _place(action: Link | Replace | Remove) -> dict[str, Any]:
    variants = documents.variants_of_tree([(id_.model, id_.variant) for id_ in action.tree.variants])
    return {**variants, "path": action.path}


def _plan_lines(plan: Plan) -> Iterator[str]:
    if not plan.changes:
        yield documents.IN_SYNC
        return
    names: dict[Entry, str] = {}
    trees: dict[str, dict[str, int]] = {}
    for action in plan.actions:
        if isinstance(action, Fetch):
            continue
        if isinstance(action, Link | Replace):
            names.setdefault(action.entry, action.path)
        if isinstance(action, LinkTree):
            names = {action.entries[path]: path for path in sorted(action.entries, reverse=True)} | names
        verb = {Link: "link", LinkTree: "link", Replace: "replace", Remove: "remove"}[type(action)]
        if isinstance(action, Remove) and action.path == "":
            verb = "remove the tree"
        row = trees.setdefault(str(action.tree), {})
        row[verb] = row.get(verb, 0) + (len(action.entries) if isinstance(action, LinkTree) else 1)
    for action in plan.actions:
        if isinstance(action, Fetch):
            what = f"{size(action.size - action.have)} of {size(action.size)}" if action.have else size(action.size)
            name = names.get(action.digest, action.digest.short)
            yield f"{'resume' if action.have else 'fetch'}  {what:>9}  {name}  from {action.url or '?'}"
    for tree, row in trees.items():
        parts = [verb if verb == "remove the tree" else f"{verb} {count(n, 'file')}" for verb, n in row.items()]
        yield f"{tree}: {', '.join(parts)}"
    s = plan.summary
    yield (
        f"{size(s.fetch_bytes)} to fetch in {count(s.fetch_blobs, 'blob')}, "
        f"{size(s.disk_bytes)} new on disk, {size(s.free_bytes)} free"
    )


# ---- reconcile, ensure


def run_reconcile(session: Session) -> Answer:
    args = session.args
    if args.dry_run:
        return plan_answer(session.ensurer().plan(removals=True, options=EnsureOptions(prune=args.prune)))
    if args.watch is None:
        return _reconcile_once(session)
    pause = settings.parse_seconds(args.watch, "--watch")
    if pause == 0:
        raise InvalidConfigError("--watch 0 would never rest", hint="e.g. --watch 60")
    while True:
        try:
            answer = _reconcile_once(session)
        except Exception as error:  # a round that fails as a whole is a round too
            if as_ours(error) is None or isinstance(error, Cancelled):
                raise
            answer = Answer(error=error)
        if args.json:
            failure = {} if answer.error is None else {"error": output.error_document(answer.error)}
            print(dump({"schema": 1, "ok": not failure, **answer.document, **failure}), flush=True)
        else:
            for line in answer.lines:
                print(line, flush=True)
        if answer.error is not None and (session.json_progress or not args.json):
            output.report_error(answer.error, as_event=session.json_progress)
        time.sleep(pause)


def _reconcile_once(session: Session) -> Answer:
    with progress_shown(session):
        outcome = session.ensurer().reconcile(prune=session.args.prune)
    return _outcome_answer(outcome, lines=tuple(_reconcile_lines(outcome)))


def run_ensure(session: Session) -> Answer:
    args = session.args
    if bool(args.selectors) == args.all:
        raise InvalidConfigError("say which variants to ensure, or --all", hint="e.g. `modelstow ensure minilm#fp16`")
    if args.into and args.all:
        raise InvalidConfigError("--into takes selectors", hint="e.g. `modelstow ensure minilm#fp16 --into DIR`")
    into = Path(absolute_path(args.into)) if args.into else None
    options = EnsureOptions(into=into, with_=frozenset(args.with_), without=frozenset(args.without), prune=args.prune)
    selectors = None if args.all else args.selectors
    with progress_shown(session):
        ensurer = session.ensurer()
        if args.dry_run:
            return plan_answer(ensurer.plan(selectors, options=options, force=args.force))
        outcome = ensurer.ensure_all(selectors, force=args.force, options=options)
    ready = tuple(dict.fromkeys(str(tree.path) for tree in outcome.trees if tree.state is ModelState.COMPLETE))
    _tell_displaced(session, outcome.report)
    return _outcome_answer(outcome, lines=ready)


def _outcome_answer(outcome: ApplyResult, *, lines: tuple[str, ...]) -> Answer:
    removed = [{"model": r.model, "variant": r.variant, "path": str(r.path)} for r in outcome.report.removed]
    document = documents.result(map(_tree_row, outcome.trees), removed, _report_summary(outcome.report))
    if outcome.report.displaced:
        document["displaced"] = [{"path": str(d.path), "to": str(d.to)} for d in outcome.report.displaced]
    if outcome.report.pruned:
        document["pruned"] = [str(event.path) for event in outcome.report.pruned]
    return Answer(document=document, lines=lines, error=outcome.error)


def _tree_row(tree: TreeResult) -> dict[str, Any]:
    return documents.tree_row(
        model=tree.model, variant=tree.variant, path=str(tree.path), state=tree.state, changed=tree.changed
    )


def _report_summary(report: Report) -> dict[str, Any]:
    return documents.result_summary(
        fetched_blobs=report.fetched_blobs,
        fetched_bytes=report.fetched_bytes,
        resumed_bytes=report.resumed_bytes,
        repaired_bytes=report.repaired_bytes,
        reused_blobs=report.reused_blobs,
        reused_bytes=report.reused_bytes,
        linked_files=report.linked_files,
        links=link_counts(report),
        seconds=report.seconds,
    )


def _reconcile_lines(outcome: ApplyResult) -> Iterator[str]:
    yield from table(documents.tree_cells(_tree_row(tree)) for tree in outcome.trees)
    for gone in outcome.report.removed:
        yield f"removed {gone.model}#{gone.variant}  {gone.path}"
    yield from _displaced_lines(outcome.report)
    report = outcome.report
    if not any(tree.changed for tree in outcome.trees) and not report.removed and outcome.error is None:
        yield f"{documents.IN_SYNC} ({seconds(report.seconds)})"
        return
    parts = [f"fetched {size(report.fetched_bytes)} in {count(report.fetched_blobs, 'blob')}"]
    if report.resumed_bytes:
        parts.append(f"resumed {size(report.resumed_bytes)}")
    if report.repaired_bytes:
        parts.append(f"{size(report.repaired_bytes)} of it for repair")
    parts.append(f"reused {size(report.reused_bytes)}")
    links = ", ".join(f"{n} by {kind}" for kind, n in link_counts(report).items() if n)
    parts.append(f"linked {count(report.linked_files, 'file')}" + (f" ({links})" if links else ""))
    yield f"{', '.join(parts)} in {seconds(report.seconds)}"


def _displaced_lines(report: Report) -> Iterator[str]:
    for event in report.displaced:
        yield f"moved {event.path} to {event.to}: it was not what the lockfile says"
    for gone in report.pruned:
        yield f"removed {gone.path}: no lockfile names it"


def _tell_displaced(session: Session, report: Report) -> None:
    if session.json_progress:
        return  # each was an event
    for line in _displaced_lines(report):
        session.print_message(line)


# ---- status


def run_status(session: Session) -> Answer:
    statuses = session.ensurer().statuses(session.args.selectors or None)
    rows = [_status_row(each) for each in statuses]
    incomplete = any(each.state is not ModelState.COMPLETE for each in statuses)
    lines = table(documents.status_cells(row, size(row["bytes_needed"]) if row["bytes_needed"] else "") for row in rows)
    return Answer(document={"models": rows}, lines=tuple(lines), code=3 if session.args.check and incomplete else 0)


def _status_row(each: VariantStatus) -> dict[str, Any]:
    return documents.status_row(
        model=each.model,
        variant=each.variant,
        state=each.state,
        path=str(each.local_path),
        missing=each.missing_files,
        corrupt=each.corrupt_files,
        extra=each.extra_files,
        bytes_needed=each.bytes_needed,
    )


# ---- verify


def run_verify(session: Session) -> Answer:
    args = session.args
    level = Level.FULL if args.full else Level.QUICK if args.quick else Level.FAST
    with progress_shown(session):
        ensurer = session.ensurer() if args.selectors else session.ensurer_with_or_without_lock()
        audit, outcome = ensurer.verify(args.selectors or None, level, repair=args.repair)
    left: tuple[Finding, ...] = audit.faults
    if outcome is not None:
        left = ensurer.verify(args.selectors or None, Level.QUICK)[0].faults
    repairs = outcome.report.repairs if outcome else ()
    document = {
        "level": level,
        "checked": {"blobs": audit.blobs, "files": audit.files, "bytes": audit.bytes, "seconds": round(audit.seconds, 3)},
        "faults": [_fault(fault) for fault in audit.faults],
        "repaired": [{"digest": r.digest, "pieces": r.pieces, "fetched_bytes": r.fetched_bytes} for r in repairs],
    }
    return _verify_answer(audit, left, document, outcome, repairs=len(repairs))


def _verify_answer(
    audit: VerifyReport, left: tuple[Finding, ...], document: dict[str, Any], outcome: ApplyResult | None, *, repairs: int
) -> Answer:
    lines = [*_verify_lines(audit)]
    if repairs:
        lines.append(f"repaired {count(repairs, 'blob')}, fetching {size(outcome.report.repaired_bytes if outcome else 0)}")
    if outcome and outcome.report.linked_files:
        lines.append(f"linked {count(outcome.report.linked_files, 'file')} again")
    corrupt = [fault for fault in left if fault.kind == "corrupt"]
    error: Exception | None = outcome.error if outcome is not None else None
    if corrupt and error is None:
        error = IntegrityError(
            f"{count(len(corrupt), 'file')} damaged and not repaired",
            hint="`modelstow verify --repair` or `modelstow ensure` fetches only the damaged pieces",
            faults=[_fault(fault) for fault in corrupt],
        )
    return Answer(document=document, lines=tuple(lines), code=3 if left else 0, error=error)


def _fault(fault: Finding) -> dict[str, Any]:
    return {
        "kind": fault.kind,
        "digest": fault.digest,
        "pieces": fault.pieces,
        "bytes": fault.bytes,
        "paths": fault.paths,
    }


def _verify_lines(audit: VerifyReport) -> Iterator[str]:
    for fault in audit.faults:
        pieces = f", {count(len(fault.pieces), 'piece')}" if fault.pieces else ""
        yield f"{fault.kind} {fault.digest.short}{pieces}"
        for path in fault.paths:
            yield f"  reached through {path}" if fault.kind == "corrupt" else f"  {path}"
        if fault.foreign_links:
            yield f"  and {count(fault.foreign_links, 'hardlink')} that no tree of ours accounts for"
    rate = f" at {size(int(audit.bytes / audit.seconds))}/s" if audit.bytes and audit.seconds else ""
    faults = count(len(audit.faults), "fault") if audit.faults else "all intact"
    checked = f"{count(audit.blobs, 'blob')}, {count(audit.files, 'file')}"
    yield f"{audit.level}: {checked}, {size(audit.bytes)} read{rate}: {faults}"
