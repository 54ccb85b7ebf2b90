"""`push`: the command about other places."""

from __future__ import annotations

from modelstow.backends import SourceError
from modelstow.cas import CasError

from ..errors import InvalidConfigError, ModelstowError
from ..interop.push import Pushed
from .output import count, size
from .progress import shown
from .session import Answer, Session


def run_push(session: Session) -> Answer:
    """Publish what the selectors hold, parts that are optional too."""
    args, done, error = session.args, Pushed(), None
    if bool(args.selectors) == args.all:
        what = "say which variants to push, or --all, and where to"
        raise InvalidConfigError(what, hint="e.g. `modelstow push minilm#fp16 s3://bucket/mirror`")
    with shown(session) as sink:
        ensurer = session.ensurer(events=sink)
        try:
            ensurer.push(
                None if args.all else args.selectors, args.url, compress=args.compress, dry_run=args.dry_run, done=done
            )
        except (ModelstowError, CasError, SourceError, OSError) as failure:
            error = failure
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
