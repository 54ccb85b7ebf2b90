"""`push`: the command about other places."""

from __future__ import annotations

import os
from collections.abc import Callable
from threading import Event

from backends import Registry, SourceError
from cas import EMPTY, BlobStore, CasError

from ..config import Settings
from ..desired import selection
from ..errors import ModelstowError
from ..exchange.push import Push
from .session import Answer, Session
from .text import count, size


def run_push(session: Session) -> Answer:
    """Publish what the selectors hold, parts that are optional too."""
    args, ensurer = session.args, session.ensurer()
    lock = ensurer.lock
    chosen = [selection.choose(lock, text) for text in args.selectors]
    variants = [lock.models[one.model].variants[one.variant] for one in chosen]
    wanted = {digest for variant in variants for digest in variant.files.values()} - {EMPTY}
    url = args.url if "://" in args.url else os.path.abspath(args.url)
    stop = Event()
    push = Push(
        store=BlobStore.open(ensurer.settings.root),
        registry=Registry(offline=ensurer.settings.offline),
        url=url,
        compress=args.compress,
        dry_run=args.dry_run,
        threads=ensurer.settings.connections,
        stop=stop,
        pay=_toll(ensurer.settings, stop),
    )
    error = None
    try:
        push.run({digest: lock.blobs[digest].size for digest in wanted})
    except (ModelstowError, CasError, SourceError, OSError) as failure:
        error = failure
    done = push.done
    word = "would send" if args.dry_run else "sent"
    told = f"{word} {count(len(done.sent), 'blob')} of {size(done.bytes)}"
    told += f" as {size(done.sent_bytes)}, {done.packed} compressed" if not args.dry_run else ""
    document = {
        "changed": bool(done.sent) and not args.dry_run,
        "sent": done.sent,
        "there": done.there,
        "packed": done.packed,
        "bytes": done.bytes,
        "sent_bytes": done.sent_bytes,
    }
    lines = (f"{told}; {count(done.there, 'blob')} there already",) if done.sent or not error else ()
    return Answer(document=document, lines=lines, error=error)


def _toll(settings: Settings, stop: Event) -> Callable[[int], None]:
    """Holds back what is sent under ``--limit-rate``, until *stop*."""
    if settings.limit_rate is None:
        return lambda count: None
    from backends.throttle import RateBudget

    return RateBudget(settings.limit_rate, sleep=stop.wait).spend
