"""A small blob from its only source, as it mostly goes: asked for once, and written.

What copes with everything that can happen costs more for ten kilobytes than their way here. So it is called upon where
something did happen: ``Download`` goes on from there.
"""

from __future__ import annotations

from modelstow.backends import ConnectionFailed, EndedEarly, TimedOut
from modelstow.cas import Stopped
from modelstow.cas.partial import Partial
from modelstow.cas.pieces import piece_hash, source_key

from ..desired.lockfile import absolute
from ..events.events import BytesArrived
from .context import STOPPED, BlobRequest, TransferContext
from .intake import FIRST_STEP, SOURCE_BUGS, BodyReader, malformed_response
from .worker import WrongSize


def suits(engine: TransferContext, wanted: BlobRequest) -> bool:
    """Whether there is nothing to choose, and nothing is known against the source."""
    few = 0 < wanted.size <= FIRST_STEP  # what comes within one read
    return few and len(wanted.urls) == 1 and not engine.failures.any and not engine.lies.of(wanted.digest)


def bring(engine: TransferContext, wanted: BlobRequest, partial: Partial) -> int:
    """How many bytes came. They are on record if they are as many as they should be; whether they are right, is to be seen.

    Raises SourceError, WrongSize, Stopped, OSError of this disk.
    """
    locator, size = absolute(wanted.urls[0], engine.base), wanted.size
    view, count = memoryview(bytearray(size + 1)), 0
    try:
        body = engine.registry.find(locator).open(locator, start=0, stop=size)
    except SOURCE_BUGS as error:
        raise malformed_response(error, locator) from error
    try:
        intake = BodyReader(body, locator, engine.policy, engine.clock)
        if body.total not in (None, size):
            raise WrongSize(size, body.total)
        if body.start != 0:
            return 0
        most = size if body.total is not None or body.ranged else size + 1  # one more tells that it is longer
        while count < most and (came := intake.read(view[count:most])):
            count += came
            if engine.stop.is_set():
                raise Stopped(STOPPED)
    except (ConnectionFailed, TimedOut):
        if not count:
            raise
    finally:
        body.close()
    if count > size:
        raise WrongSize(size, count)
    if not count:
        raise EndedEarly("the body ended early", locator=locator)
    engine.emit(BytesArrived(digest=wanted.digest, count=count))
    if count == size:
        partial.write(0, view[:size])
        partial.finish(0, piece_hash(view[:size]), source_key(locator))
    return count  # a beginning is not kept; but no attempt is spent on what brought something
