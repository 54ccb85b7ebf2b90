"""`push`: the command that publishes to a mirror."""

from __future__ import annotations

from modelstow.backends import SourceError
from modelstow.cas import CasError

from ..errors import InvalidConfigError, ModelstowError
from ..interop.push import Pushed
from .output import count, size
from .progress import progress_shown
from .session import Answer, Session


def run_push(session: Session) -> Answer:
    """Publish the blobs of the selected variants, optional components included."""
    args, done, error = session.args, Pushed(), None
    if bool(args.selectors) == args.all:
        what = "name the variants to push, or --all, and the mirror"
        raise InvalidConfigError(what, hint="e.g. `modelstow push minilm#fp16 s3://bucket/mirror`")
    with progress_shown(session):
        ensurer = session.ensurer()
        try:
            ensurer.push(
                None if args.all else args.selectors, args.url, compress=args.compress, dry_run=args.dry_run, done=done
            )
        except (ModelstowError, CasError, SourceError, OSError) as failure:
            error = failure
    word = "would send" if args.dry_run else "sent"
    line = f"{word} {count(len(done.sent), 'blob')} of {size(done.bytes)}"
    line += f" as {size(done.sent_bytes)}, {done.compressed} compressed" if not args.dry_run else ""
    document = {
        "changed": bool(done.sent) and not args.dry_run,
        "sent": done.sent,
        "present": done.present,
        "compressed": done.compressed,
        "bytes": done.bytes,
        "sent_bytes": done.sent_bytes,
    }
    lines = (f"{line}; {count(done.present, 'blob')} already present",) if done.sent or not error else ()
    return Answer(document=document, lines=lines, error=error)
