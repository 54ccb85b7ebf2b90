"""The state machine that schedules a transfer: its rules by example, and its laws under failing and corrupt sources."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import pytest
from builders import PIECE, piece_count
from hypothesis import example, given, settings
from hypothesis import strategies as st
from strategies import Reply, Sim, crowds

from modelstow.cas.chunking import DEFAULT, Chunking
from modelstow.reconcile.transfer.retry import Failure, Reason, RetryPolicy, RetrySchedule
from modelstow.reconcile.transfer.scheduler import EARLIER, Scheduler
from modelstow.reconcile.transfer.state import Backoff, Fail, Idle, Request, Verify

CUT = Failure(code="SOURCE_UNAVAILABLE", what="cut", reason=Reason.TRANSIENT)
GONE = Failure(code="INCOMPLETE_DOWNLOAD", what="HTTP 404", reason=Reason.NOT_FOUND)
DENIED = Failure(code="AUTH_FAIL", what="HTTP 401", reason=Reason.AUTHENTICATION)
BUSY = Failure(code="RATE_LIMIT", what="HTTP 429", reason=Reason.RATE_LIMIT)
WRONG = Failure(code="CHECKSUM_FAIL", what="sent corrupt data", reason=Reason.CORRUPT_DATA)
A, B, C = "mem://a", "mem://b", "mem://c"
THREE = 3 * PIECE - 5


def transfer(
    *locators: str, size: int = THREE, recently_failed=(), exhausted=(), jitter: float = 1.0, **policy: object
) -> Scheduler:
    return Scheduler(
        size, locators, RetryPolicy(**policy), frozenset(recently_failed), frozenset(exhausted), jitter=lambda: jitter
    )


def send(t: Scheduler, sender: str, *pieces: int, corrupt: bool = False) -> None:
    for piece in pieces:
        t.hold(piece, sender, right(piece) if not corrupt else f"{sender} corrupts".encode())


def right(piece: int) -> bytes:
    return b"right %d" % piece


def begin(t: Scheduler, locator: str = "", now: float = 0.0, allowed: int = 1) -> Request:
    """The next range is on its way."""
    step = t.next(now, allowed)
    assert isinstance(step, Request), step
    assert locator in ("", step.locator)
    return step


def deliver(t: Scheduler, request: Request, now: float, *, pieces: int = 99) -> None:
    """Some pieces of a range arrive, and are right; with the last the range is over."""
    indices = range(request.start // PIECE, piece_count(request.stop))
    for piece in indices[:pieces]:
        assert t.received(request.claim, 1, now) and t.may_write(request.claim, piece)
        t.completed(request.claim, piece, right(piece), now)
    if pieces >= len(indices):
        t.ended(request.claim)


def requested(t: Scheduler, now: float = 0.0) -> str:
    """The source that would be requested."""
    return span(t, now)[0]


def span(t: Scheduler, now: float = 0.0) -> tuple[str, int, int]:
    """The source that would be requested, and the bytes."""
    step = begin(t, now=now)
    t.ended(step.claim)
    return step.locator, step.start, step.stop


def fail(t: Scheduler, locator: str, failure: Failure, now: float, *, after: int = 0) -> None:
    """The next range is requested of this source, which sends *pieces* pieces and fails."""
    step = begin(t, locator, now)
    deliver(t, step, now, pieces=after) if after else None
    assert t.failed(step.claim, failure, now)


# ---- examples


def test_the_first_source_is_requested_for_everything():
    """The best source, for the whole run of missing pieces in bytes."""
    assert span(transfer(A, B)) == (A, 0, THREE)


def test_a_source_named_twice_is_one_source():
    """Its failure is reported once."""
    t = transfer(A, A)
    fail(t, A, GONE, 0)

    assert t.next(0) == Fail({A: GONE})


def test_pieces_that_are_held_are_not_requested_for():
    """What an earlier run left is skipped: the first run of missing pieces comes first."""
    t = transfer(A, size=6 * PIECE)
    send(t, EARLIER, 0, 3)

    assert span(t, 0) == (A, PIECE, 3 * PIECE)
    send(t, A, 1, 2)
    assert span(t, 0) == (A, 4 * PIECE, 6 * PIECE)


def test_a_full_blob_is_to_be_verified():
    """Nothing is requested when every piece is held; a blob of no bytes has none."""
    t = transfer(A)
    send(t, A, 0, 1, 2)

    assert t.next(0) == Verify() and t.verified() == ()
    assert transfer(size=0).next(0) == Verify()


def test_without_a_source_it_gives_up():
    """No locator, no failure to report."""
    assert transfer().next(0) == Fail({})


def test_a_source_that_failed_recently_is_requested_last_and_not_never():
    """Recently failed sources come after the others, in their order."""
    t = transfer(A, B, C, recently_failed=[A, B])

    assert requested(t) == C
    fail(t, C, GONE, 0)
    assert requested(t) == A
    fail(t, A, GONE, 0)
    assert requested(t) == B


def test_where_all_failed_recently_the_first_is_requested_at_once():
    """No other source is left, so there is no wait."""
    assert requested(transfer(A, recently_failed=[A])) == A


def test_a_source_that_was_exhausted_has_one_attempt_until_it_sends_a_piece():
    """Progress restores its attempts."""
    t = transfer(A, recently_failed=[A], exhausted=[A])
    fail(t, A, CUT, 0)
    assert t.next(0) == Fail({A: CUT})

    t = transfer(A, recently_failed=[A], exhausted=[A])
    fail(t, A, CUT, 0, after=1)
    assert isinstance(t.next(0), Backoff)


def test_a_source_that_another_blob_still_asks_again_has_all_its_attempts():
    """A server that is away for a second fails the blobs under way, and must not fail the queue behind them."""
    t = transfer(A, recently_failed=[A])
    fail(t, A, CUT, 0)
    assert isinstance(t.next(0), Backoff)


def test_while_one_source_pauses_another_is_requested():
    """A transient failure pauses only the source that failed."""
    t = transfer(A, B)
    fail(t, A, CUT, 0)

    assert requested(t) == B
    fail(t, B, CUT, 0)
    assert t.next(0) == Backoff(seconds=1.0)
    assert requested(t, 1.0) == A


def test_pauses_double_to_the_longest_and_progress_resets_them():
    """1, 2, 4, 8 seconds; a new piece restores the source's attempts."""
    t = transfer(A)
    pauses, now = [], 0.0
    for _ in range(4):
        fail(t, A, CUT, now)
        step = t.next(now)
        assert isinstance(step, Backoff)
        pauses.append(step.seconds)
        now += step.seconds
    assert pauses == [1.0, 2.0, 4.0, 8.0]

    fail(t, A, CUT, now, after=1)

    assert t.next(now) == Backoff(seconds=1.0)


def test_attempts_in_a_row_end_a_source():
    """Five failures without a new piece end it, and its reason is reported."""
    t = transfer(A)
    for turn in range(5):
        fail(t, A, CUT, 100.0 * turn)

    assert t.next(1e9) == Fail({A: CUT})


def test_a_throttled_source_has_its_own_attempts_and_pauses():
    """429 and 503 count apart from broken connections."""
    t = transfer(A)
    for turn in range(9):
        fail(t, A, BUSY, 1000.0 * turn)
    for turn in range(4):
        fail(t, A, CUT, 10_000.0 + 1000.0 * turn)
    fail(t, A, BUSY, 20_000.0)

    assert t.next(1e9) == Fail({A: BUSY})


def test_a_refusal_is_tried_once_more_at_once_and_no_more():
    """A signed address may have expired; waiting repairs no credential."""
    t = transfer(A)
    fail(t, A, DENIED, 0)
    fail(t, A, DENIED, 0)

    assert t.next(0) == Fail({A: DENIED})


@pytest.mark.parametrize(
    ("retry_after", "pause"), [(None, 5.0), (0.0, 5.0), (-9.0, 5.0), (2.0, 5.0), (77.0, 77.0), (1e9, 300.0)]
)
def test_retry_after_is_honoured_up_to_its_cap(retry_after, pause):
    """At least the pause of the policy, at most five minutes."""
    t = transfer(A)
    fail(t, A, Failure(code="RATE_LIMIT", what="429", reason=Reason.RATE_LIMIT, retry_after=retry_after), 0)

    assert t.next(0) == Backoff(seconds=pause)


def test_jitter_shortens_a_pause_by_half_at_most():
    """So that many clients do not come back together."""
    t = transfer(A, jitter=0.0)
    fail(t, A, CUT, 0)

    assert t.next(0) == Backoff(seconds=0.5)


def test_a_permanent_failure_ends_the_source_for_this_blob():
    """The next one takes over at once, from where the first one stopped."""
    t = transfer(A, B)
    send(t, A, 0)
    fail(t, A, GONE, 0)

    assert span(t, 0) == (B, PIECE, THREE)
    fail(t, B, GONE, 0)
    assert t.next(0) == Fail({A: GONE, B: GONE})


def test_one_sender_of_wrong_bytes_is_marked_corrupt_and_another_takes_over():
    """Everything it sent is invalidated."""
    t = transfer(A, B)
    send(t, A, 0, 1, 2, corrupt=True)

    assert t.digest_mismatch(WRONG) == ((0, 1, 2), (A,))
    assert span(t, 0) == (B, 0, THREE)


def test_where_no_other_can_take_over_the_corrupt_sender_is_requested_once_more():
    """Once: a proxy may have been wrong. Then it is given up with the reason."""
    t = transfer(B, A)
    fail(t, B, GONE, 0)
    send(t, A, 0, 1, 2, corrupt=True)
    t.digest_mismatch(WRONG)

    assert requested(t) == A
    send(t, A, 0, 1, 2, corrupt=True)
    t.digest_mismatch(WRONG)

    assert t.next(0) == Fail({A: WRONG, B: GONE})


def test_of_two_senders_the_reference_source_replaces_the_pieces_of_the_other():
    """The source that sent most is kept; if the whole is right then, the other one had sent corrupt data."""
    t = transfer(A, B)
    send(t, A, 0, corrupt=True)
    fail(t, A, CUT, 0)
    send(t, B, 1, 2)

    assert t.digest_mismatch(WRONG) == ((0,), ())
    assert span(t, 0) == (B, 0, PIECE)
    send(t, B, 0)

    assert t.next(0) == Verify() and t.verified() == (A,)


def test_a_corrupt_reference_source_is_marked_and_the_correct_one_is_not():
    """The correct source then serves the whole blob and is not marked corrupt."""
    t = transfer(A, B)
    send(t, A, 0, 1, corrupt=True)
    fail(t, A, CUT, 0)
    send(t, B, 2)

    assert t.digest_mismatch(WRONG) == ((2,), ())
    assert requested(t, 1000.0) == A, "while there is a reference source only that is requested"
    send(t, A, 2, corrupt=True)

    assert t.digest_mismatch(WRONG) == ((0, 1, 2), (A,))
    assert span(t, 0) == (B, 0, THREE)
    send(t, B, 0, 1, 2)
    assert t.verified() == ()


def test_wrong_pieces_of_an_earlier_run_cost_only_themselves():
    """No current source is marked corrupt for pieces that were there before."""
    t = transfer(A)
    send(t, EARLIER, 0, corrupt=True)
    send(t, A, 1, 2)

    invalidated, marked = t.digest_mismatch(WRONG)

    assert (invalidated, marked) == ((0,), ())
    send(t, A, 0)
    assert t.verified() == (EARLIER,)


def test_a_reference_source_that_fails_for_good_makes_room_for_the_others():
    """What it could not replace, another may."""
    t = transfer(A, B, C)
    send(t, A, 0, 1, corrupt=True)
    fail(t, A, CUT, 0)
    send(t, B, 2)
    t.digest_mismatch(WRONG)
    fail(t, A, GONE, 1000.0)

    assert requested(t) in (B, C)


def test_a_reference_source_with_an_impossible_piece_makes_room_for_the_others():
    """A piece that cannot be right marks it corrupt; a correct source is still there and is requested."""
    t = transfer(A, B)
    send(t, A, 0, 1, corrupt=True)
    fail(t, A, CUT, 0)
    send(t, B, 2)
    t.digest_mismatch(WRONG)
    t.piece_mismatch(begin(t, A, 1000.0).claim, WRONG)

    assert requested(t) == B


def test_a_piece_that_cannot_be_right_marks_its_sender_corrupt_at_once():
    """The next source is requested for that piece; where there is none, the same once more."""
    t = transfer(A, B)
    for locator in (A, B, A, B):
        t.piece_mismatch(begin(t, locator).claim, WRONG)

    assert t.next(0) == Fail({A: WRONG, B: WRONG})


def test_where_all_senders_are_over_none_is_marked_for_what_another_may_have_done():
    """The corrupt sender is unknown; the pieces are invalidated and a third source serves the whole."""
    t = transfer(A, B, C, recently_failed=[C])
    send(t, A, 0, corrupt=True)
    fail(t, A, GONE, 0)
    fail(t, B, GONE, 0)
    send(t, B, 1, 2)

    invalidated, marked = t.digest_mismatch(WRONG)

    assert marked == ()
    assert 0 in invalidated and requested(t) == C


@pytest.mark.parametrize("locators", [(A,), (A, B), ()])
def test_a_blob_of_no_bytes_that_is_wrong_ends(locators):
    """No source can make it right, so the transfer fails instead of verifying forever."""
    t = transfer(*locators, size=0)
    steps = 0
    while isinstance(t.next(0), Verify) and steps < 20:
        t.digest_mismatch(WRONG)
        steps += 1

    assert isinstance(t.next(0), Fail)


# ---- several ranges at once


def test_further_connections_try_every_source_and_then_the_fastest():
    """One piece of each source not tried yet; after that the source that is fastest just now."""
    t = transfer(A, B, size=64 * PIECE)
    first, second = begin(t, A), begin(t, B, allowed=8)
    assert second.stop - second.start == PIECE
    deliver(t, second, 0.1)
    deliver(t, first, 4.0, pieces=1)
    assert requested(t, 4.0) == B
    slower = begin(t, B, 4.0, allowed=8)
    deliver(t, slower, 44.0, pieces=1)

    assert begin(t, now=44.0, allowed=8).locator == A, "what was fast may have become slow"


def test_a_rest_is_shared_by_connections_in_file_order():
    """A later connection takes unclaimed pieces from the front, so that hashing can follow; none is sent twice."""
    t = transfer(A, size=64 * PIECE)
    deliver(t, begin(t, A), 1.0, pieces=1)
    rows = [begin(t, A, 1.0, allowed=4) for _ in range(4)]

    owners = [sum(t.owns(claim, piece) for claim in range(1, 6)) for piece in range(1, 64)]
    claimed = sum(owners)
    assert owners == [1] * claimed + [0] * (63 - claimed) and claimed < 63
    assert all(row.stop > row.start for row in rows)


def test_what_is_requested_for_stays_near_the_first_gap():
    """Else one slow piece at the front would let the rest run far ahead of the proof (D17)."""
    t = transfer(A, size=64 * PIECE, window=4 * PIECE)

    assert span(t) == (A, 0, 4 * PIECE)


def test_a_slow_range_keeps_its_share_when_a_connection_is_free():
    """The tail of a transfer is short: it does not wait for one connection while others are free."""
    t = transfer(A, size=8 * PIECE)
    slow = begin(t, A)
    for piece in (0, 1):
        assert t.may_write(slow.claim, piece)
        t.completed(slow.claim, piece, right(piece), 2.0 * (piece + 1))

    taker = begin(t, A, 4.0, allowed=2)

    assert (taker.start, taker.stop) == (3 * PIECE, 4 * PIECE)
    assert [piece for piece in range(8) if t.owns(slow.claim, piece)] == [2]


def test_what_will_be_there_at_once_is_not_divided():
    """A new request costs more than it saves."""
    t = transfer(A, size=8 * PIECE)
    deliver(t, begin(t, A), 0.01, pieces=1)

    assert t.next(0.01, 2) == Idle()


def test_the_last_piece_of_a_slow_source_goes_to_a_fast_one_that_is_free():
    """Once started it is fetched by the fast source; what the slow one sends of it is not written."""
    t = transfer(A, B, size=2 * PIECE)
    slow = begin(t, A)
    fast = begin(t, B, 0.0, allowed=2)
    deliver(t, fast, 0.1)
    assert t.received(slow.claim, 1000, 10.0)

    taken = begin(t, B, 10.0, allowed=2)

    assert (taken.start, taken.stop) == (0, PIECE)
    assert not t.active(slow.claim) and not t.may_write(slow.claim, 0) and not t.received(slow.claim, 1, 10.0)
    assert not t.failed(slow.claim, CUT, 10.0), "what was taken over is not its failure"


def test_a_piece_that_is_being_written_is_not_taken_over():
    """It is whole in memory: a second writer could only do harm (D5)."""
    t = transfer(A, B, size=PIECE)
    slow = begin(t, A)
    assert t.may_write(slow.claim, 0)

    assert t.next(1e6, 2) == Idle() and t.stalled(1e6) == []
    t.completed(slow.claim, 0, right(0), 1e6)
    t.ended(slow.claim)
    assert t.next(1e6) == Verify()


def test_a_stalled_range_is_replaced_where_another_source_is_ready_and_not_before():
    """Five seconds without a byte; a source that is alone is waited for."""
    t = transfer(A, B)
    one = begin(t, A)
    assert t.stalled(4.0) == [] and t.stalled(6.0) == [one.claim]
    assert t.received(one.claim, 1, 6.0) and t.stalled(10.0) == []

    alone = transfer(A)
    begin(alone, A)
    assert alone.stalled(60.0) == []


def test_a_stalled_range_is_replaced_where_its_source_still_sends_to_another_connection():
    """One dead connection is renewed."""
    t = transfer(A, size=64 * PIECE)
    dead, alive = begin(t, A), begin(t, A, 1.0, allowed=2)
    t.received(alive.claim, 1, 6.0)

    assert t.stalled(6.0) == [dead.claim]


def test_a_server_that_asks_to_slow_down_gets_fewer_connections():
    """After a 429 no more than were still running."""
    t = transfer(A, size=64 * PIECE)
    rows = [begin(t, A, allowed=4) for _ in range(4)]
    t.failed(rows[0].claim, BUSY, 0.0)

    later = 1e3
    assert t.next(later, 4) == Idle()
    t.ended(rows[1].claim)
    begin(t, A, later, allowed=4)


def test_a_source_that_ignores_ranges_has_one_connection_and_sends_what_no_other_does():
    """It sends everything from the start; a second connection would get the same again."""
    t = transfer(A, B, size=8 * PIECE)
    endless = begin(t, A)
    t.ignores_ranges(endless.claim)
    t.failed(begin(t, B, allowed=2).claim, GONE, 0.0)

    assert t.next(0.0, 2) == Idle()
    assert all(t.owns(endless.claim, piece) for piece in range(8))


def test_a_source_that_ignores_ranges_is_not_requested_next_to_one_that_has_them():
    """To get its last piece all before it would come too, and be thrown away."""
    t = transfer(A, B, size=64 * PIECE)
    deliver(t, begin(t, A), 1.0, pieces=2)
    tried = begin(t, B, 1.0, allowed=8)
    t.ignores_ranges(tried.claim)

    assert not t.active(tried.claim)
    assert all(begin(t, A, 1.0, allowed=8).locator == A for _ in range(3))


def test_where_fewer_connections_do_as_well_the_least_advanced_ranges_end():
    """What they had of their pieces is lost, so that it should be little."""
    t = transfer(A, size=64 * PIECE)
    rows = [begin(t, A, allowed=4) for _ in range(4)]
    for row in rows:
        t.received(row.claim, 1000 * row.claim, 0.0)

    assert t.least_advanced(2) == [rows[0].claim, rows[1].claim]


def test_a_local_file_may_be_taken_at_once_only_by_one_that_is_alone():
    """Sharing extents replaces the whole file, so no other connection may be writing."""
    t = transfer(A, B)
    one = begin(t, A)
    assert t.claim_all(one.claim)
    assert all(t.owns(one.claim, piece) for piece in range(3))

    t = transfer(A, B, size=64 * PIECE)
    one, two = begin(t, A), begin(t, B, allowed=2)
    assert not t.claim_all(one.claim) and not t.claim_all(two.claim)


# ---- laws


@dataclass
class Flight:
    """A range on its way in the simulated world: the pieces still to come, and when the next thing happens to it."""

    request: Request
    left: list[int]
    reply: Reply
    due: float


@dataclass
class World:
    """Drives a transfer against simulated sources and keeps an account of what they did."""

    sims: Mapping[str, Sim]
    pieces: int
    policy: RetryPolicy
    earlier: Mapping[int, str] = field(default_factory=dict)  # piece -> who sent it, right unless it corrupts it
    jumps: tuple[float, ...] = (0.0,)
    allowed: int = 1  # connections at once
    chunking: Chunking = DEFAULT
    now: float = 1_000.0
    steps: int = 0
    waits: list[float] = field(default_factory=list)
    held: dict[int, bytes] = field(default_factory=dict)
    begun: int = 0  # pieces that a source began to send
    taken_over: int = 0  # pieces that another sent while they were on their way
    corrupt: set[str] = field(default_factory=set)  # who ever sent a wrong piece
    marked: set[str] = field(default_factory=set)  # by ``digest_mismatch``
    proven: tuple[str, ...] = ()  # corrupt, by ``verified``
    requests: dict[str, int] = field(default_factory=dict)
    prefixes: dict[int, tuple[str, int]] = field(default_factory=dict)  # of pieces: who sent it, up to where
    farthest: dict[int, int] = field(default_factory=dict)  # that any beginning of a piece went
    # Failures in a row without a new piece: plain and throttled, as the policy counts them.
    row: dict[str, list[int]] = field(default_factory=dict)
    gone: set[str] = field(default_factory=set)
    fresh: set[str] = field(default_factory=set)  # recently failed ones that have not sent a piece
    flights: list[Flight] = field(default_factory=list)

    @property
    def piece(self) -> int:
        return self.chunking.piece_bytes

    def run(self) -> Verify | Fail:
        t = Scheduler(
            self.pieces * self.piece,
            tuple(self.sims),
            self.policy,
            frozenset(locator for locator, sim in self.sims.items() if sim.recently_failed),
            jitter=lambda: (self.steps * 0.37) % 1.0,
            chunking=self.chunking,
        )
        self.fresh = {locator for locator, sim in self.sims.items() if sim.recently_failed}
        for piece, sender in self.earlier.items():
            t.hold(piece, sender, self._sent(piece, sender))
        while True:
            self.steps += 1
            assert self.steps <= self.most_steps(), "it does not end"
            for flight in [flight for flight in self.flights if not t.active(flight.request.claim)]:
                self.flights.remove(flight)
                self.taken_over += bool(flight.left)
            step = t.next(self.now, self.allowed) if len(self.flights) < self.allowed else Idle()
            assert isinstance(step, Request | Idle) or not self.flights
            match step:
                case Request():
                    self._take_off(t, step)
                case Idle():
                    assert self.flights, "idle for ever"
                    self._fly(t)
                case Backoff(seconds=seconds):
                    self.waits.append(seconds)
                    self.now += seconds
                case Verify():
                    if all(self.held.get(piece) == right(piece) for piece in range(self.pieces)):
                        self.proven = t.verified()
                        return step
                    invalidated, marked = t.digest_mismatch(WRONG)
                    assert invalidated, "nothing changed"
                    for piece in invalidated:
                        del self.held[piece]
                        self.farthest.pop(piece, None)
                    self.marked |= set(marked)
                case Fail():
                    return step

    def most_steps(self) -> int:
        """Each source is corrupt and the reference twice at most; between two pieces all may run out of attempts."""
        rounds = 4 * len(self.sims) + 4
        failures = 2 * len(self.sims) * (self.policy.transient.attempts + self.policy.rate_limit.attempts)
        prefixes = max(1, self.piece // self.policy.progress)  # each may count as a piece
        return 16 * rounds * (self.pieces * prefixes + 1) * (failures + 2)

    def _sent(self, piece: int, sender: str) -> bytes:
        sim = self.sims.get(sender, Sim())
        wrong = piece in sim.corrupt and self.requests.get(sender, 0) <= sim.corrupt_for
        hash_ = f"{sender} corrupts {piece}".encode() if wrong or sender == "mem://corrupt of old" else right(piece)
        if hash_ != right(piece):
            self.corrupt.add(sender)
        self.held[piece] = hash_
        return hash_

    def _take_off(self, t: Scheduler, request: Request) -> None:
        assert request.start < request.stop <= self.pieces * self.piece and request.stop % self.piece == 0
        indices = list(range(request.start // self.piece, self.chunking.count(request.stop)))
        if request.start % self.piece:
            begun = self.prefixes[indices[0]]
            assert begun == (request.locator, request.start), "two sources would share a piece"
        for piece in indices:
            self.prefixes.pop(piece, None)
        assert not any(piece in self.held for piece in indices), "a piece is requested that is held"
        sim, number = self.sims[request.locator], self.requests.get(request.locator, 0)
        self.requests[request.locator] = number + 1
        reply = sim.replies[number] if number < len(sim.replies) else Reply()
        self.now += self.jumps[self.steps % len(self.jumps)]
        self.flights.append(Flight(request, indices[: reply.pieces], reply, self.now + sim.piece_s))
        self.begun += bool(indices[: reply.pieces])

    def _fly(self, t: Scheduler) -> None:
        """The next thing happens to one range; a second passes at most, and stalls are checked as often."""
        flight = min(self.flights, key=lambda flight: flight.due)
        if flight.due > self.now + 1.0:
            self.now += 1.0
            for slow in self.flights:
                if slow.left and (piece_s := self.sims[slow.request.locator].piece_s) < 60:
                    t.received(slow.request.claim, int(self.piece / piece_s), self.now)
            for claim in t.stalled(self.now):
                self._end(t, next(f for f in self.flights if f.request.claim == claim), "cut")
            return
        self.now = max(self.now, flight.due)
        claim, locator = flight.request.claim, flight.request.locator
        if flight.left:
            piece = flight.left.pop(0)
            t.received(claim, self.piece, self.now)
            assert t.may_write(claim, piece)
            assert piece not in self.held, "written twice"
            hash_ = self._sent(piece, locator)
            self.row[locator] = [0, 0]
            self.fresh.discard(locator)
            t.completed(claim, piece, hash_, self.now)
            flight.due = self.now + self.sims[locator].piece_s
            if flight.left and t.owns(claim, flight.left[0]):
                self.begun += 1
            else:
                flight.left = []
                if not flight.reply.then or not t.has_later(claim, 0):
                    self._end(t, flight, "")
        else:
            self._end(t, flight, flight.reply.then)

    def _end(self, t: Scheduler, flight: Flight, how: str) -> None:
        locator, after = flight.request.locator, flight.reply.retry_after
        self.flights.remove(flight)
        plain, throttled = self.row.setdefault(locator, [0, 0])
        if not how:
            t.ended(flight.request.claim)
        elif how == "gone" and t.failed(flight.request.claim, GONE, self.now):
            self.gone.add(locator)
        elif how in ("cut", "throttle"):
            reason = Reason.TRANSIENT if how == "cut" else Reason.RATE_LIMIT
            failure = Failure(code="SOURCE_UNAVAILABLE", what=how, reason=reason, retry_after=after)
            piece, reached = self._reached(t, flight)
            if t.failed(flight.request.claim, failure, self.now, reached):
                if reached:
                    self.prefixes[piece] = locator, reached
                if reached and reached - self.farthest.get(piece, piece * self.piece) >= self.policy.progress:
                    self.farthest[piece] = reached
                    plain = throttled = 0
                    self.fresh.discard(locator)
                self.row[locator] = [plain + (how == "cut"), throttled + (how == "throttle")]

    def _reached(self, t: Scheduler, flight: Flight) -> tuple[int, int]:
        """The piece that was arriving when a flight ended, and where in the blob what had come of it ends; 0: nothing."""
        piece = t.current_piece(flight.request.claim)
        came = min(flight.reply.part << 20, self.piece - 1) if piece >= 0 else 0
        reached = max(flight.request.start, piece * self.piece) + came
        return piece, reached if came and reached < (piece + 1) * self.piece else 0

    def over(self, locator: str) -> bool:
        """Whether this source has no attempts left."""
        plain, throttled = self.row.get(locator, [0, 0])
        attempts = 1 if locator in self.fresh else self.policy.transient.attempts
        return locator in self.gone or plain >= attempts or throttled >= self.policy.rate_limit.attempts

    def correct_sources(self) -> set[str]:
        return {locator for locator, sim in self.sims.items() if not sim.corrupt}


policies = st.builds(
    RetryPolicy,
    transient=st.builds(
        RetrySchedule, attempts=st.integers(1, 5), pause_s=st.sampled_from([0.0, 0.1, 1.0]), factor=st.just(2.0)
    ),
    rate_limit=st.builds(
        RetrySchedule, attempts=st.integers(1, 5), pause_s=st.sampled_from([0.0, 5.0]), factor=st.just(1.5)
    ),
    retry_after_cap_s=st.sampled_from([0.0, 300.0]),
    window=st.sampled_from([1, 2 * PIECE, 512 << 20]),
)
jumps = st.lists(st.sampled_from([0.0, 0.001, 1.0, 1e6]), min_size=1, max_size=3).map(tuple)


@st.composite
def worlds(draw: st.DrawFn, *, with_steady: bool = False) -> World:
    sims = draw(crowds(with_steady=with_steady))
    pieces = draw(st.integers(1, 9))
    senders = st.sampled_from([*sims, EARLIER, "mem://corrupt of old"])
    earlier = draw(st.dictionaries(st.integers(0, pieces - 1), senders))
    allowed = draw(st.integers(1, 5))
    chunking = draw(st.sampled_from([Chunking(64 << 10), Chunking(1 << 20), DEFAULT, Chunking(64 << 20)]))
    return World(sims, pieces, draw(policies), earlier=earlier, jumps=draw(jumps), allowed=allowed, chunking=chunking)


@pytest.mark.slow
@given(worlds())
@settings(max_examples=300)
def test_a_transfer_always_ends(world):
    """Whatever the sources do, within a number of steps that follows from the policy."""
    world.run()


@pytest.mark.slow
@given(worlds())
@settings(max_examples=300)
def test_it_never_gives_up_while_a_correct_source_could_still_serve(world):
    """Where it gives up, every correct source is over: permanently, or out of attempts."""
    end = world.run()

    if isinstance(end, Fail):
        assert [locator for locator in world.correct_sources() if not world.over(locator)] == []
        assert set(end.failures) == set(world.sims)


@given(worlds(with_steady=True))
@settings(max_examples=300)
@example(World({A: Sim(corrupt=frozenset([0])), B: Sim()}, 1, RetryPolicy()))
@example(World({A: Sim((Reply(1, "gone"),), frozenset([0])), B: Sim()}, 2, RetryPolicy()))
@example(World({A: Sim((Reply(2, "cut"),), frozenset([0])), B: Sim((Reply(1, "cut"),)), C: Sim()}, 4, RetryPolicy()))
def test_it_ends_with_the_right_bytes_where_a_correct_source_can_be_reached(world):
    """One correct source that serves is enough, however many others send corrupt data, stall or break off."""
    end = world.run()

    assert end == Verify()
    assert world.held == {piece: right(piece) for piece in range(world.pieces)}


@pytest.mark.slow
@given(worlds())
@settings(max_examples=150)
def test_no_correct_source_is_marked_corrupt(world):
    """Neither when the whole is wrong nor when it is right at last."""
    world.run()

    assert set(world.proven) <= world.corrupt
    assert world.marked - {EARLIER, "mem://corrupt of old"} <= world.corrupt


@pytest.mark.slow
@given(worlds())
@settings(max_examples=150)
def test_pauses_are_bounded_by_the_policy(world):
    """No source, clock or Retry-After makes a transfer wait longer."""
    world.run()

    p = world.policy
    longest = max(p.transient.longest_s, p.rate_limit.longest_s, p.retry_after_cap_s)
    assert all(0 < seconds <= longest for seconds in world.waits)


@given(st.lists(st.sampled_from([0.001, 0.1, 1.0, 20.0]), min_size=1, max_size=4), st.integers(1, 40), st.integers(1, 8))
@settings(max_examples=200)
def test_correct_sources_send_no_more_than_the_blob_and_what_was_taken_over(speeds, pieces, allowed):
    """Each piece is written once; beyond the size only pieces that a slow source had begun are sent twice, if ever."""
    world = World({f"mem://{n}": Sim(piece_s=s) for n, s in enumerate(speeds)}, pieces, RetryPolicy(), allowed=allowed)

    assert world.run() == Verify()
    assert world.begun <= pieces + world.taken_over
    assert world.taken_over <= world.policy.takeovers * pieces
    assert allowed > 1 or world.taken_over == 0


@given(st.integers(8, 40), st.integers(2, 8))
def test_a_slow_source_does_not_hold_up_the_end(pieces, allowed):
    """Next to a source a thousand times faster, the whole takes far less than the slow one's share would."""
    world = World({A: Sim(piece_s=100.0), B: Sim(piece_s=0.1)}, pieces, RetryPolicy(), allowed=allowed)
    began = world.now

    assert world.run() == Verify()
    assert world.now - began < 100.0


@given(worlds())
def test_a_single_correct_source_is_requested_once_for_each_gap(world):
    """A source that serves what is requested gets one request for each gap, and no more."""
    for locator in world.sims:
        alone = World({locator: Sim()}, world.pieces, RetryPolicy(), earlier=dict.fromkeys(world.earlier, EARLIER))
        gaps = sum(1 for p in range(world.pieces) if p not in alone.earlier and (p == 0 or p - 1 in alone.earlier))

        assert alone.run() == Verify()
        assert alone.requests.get(locator, 0) == gaps


def test_ranges_that_break_together_are_one_failure():
    """A server that restarts cuts every connection at once: that costs it one attempt, not as many as there were."""
    t = transfer(A, size=40 * PIECE, transient=RetrySchedule(attempts=2, pause_s=1.0))
    requests = [begin(t, A, allowed=8) for _ in range(8)]
    for request in requests:
        assert t.failed(request.claim, CUT, 1.0)

    assert t.next(1.0, 8) == Backoff(seconds=1.0)
    again = begin(t, A, now=2.0)
    assert t.failed(again.claim, CUT, 2.0)
    assert t.next(2.0) == Fail({A: CUT})


def test_a_source_without_ranges_is_released_though_another_sends_the_beginning():
    """Whose claim piece 0 is decides: that of a fast source is no reason to wait for all that a slow one sends first."""
    t = transfer(A, B, size=20 * PIECE)
    begin(t, A, allowed=2)
    slow = begin(t, B, allowed=2)
    t.ignores_ranges(slow.claim)

    assert not t.active(slow.claim)


def test_a_source_without_ranges_is_released_when_everything_is_there():
    """The transfer does not wait for pieces that other sources have sent already."""
    t = transfer(A, B, size=3 * PIECE)
    send(t, EARLIER, 1)
    endless = begin(t, A, allowed=2)
    t.ignores_ranges(endless.claim)
    assert t.may_write(endless.claim, 0)
    t.completed(endless.claim, 0, right(0), 1.0)
    deliver(t, begin(t, B, now=1.0, allowed=2), 2.0)

    assert t.next(2.0) == Verify()
    assert not t.active(endless.claim)


# ---- pieces that were begun


def test_a_piece_that_broke_off_is_resumed_by_its_source():
    """From the byte where it ended, to the end of the range."""
    t = transfer(A, size=3 * PIECE)
    step = begin(t, A)
    assert t.failed(step.claim, CUT, 1.0, reached=5000)

    again = begin(t, A, now=10.0)
    assert (again.start, again.stop) == (5000, 3 * PIECE)


def test_a_piece_that_one_source_began_another_fetches_whole():
    """A piece has one sender, or a fault could not be attributed; what the first had sent is overwritten."""
    t = transfer(A, B, size=PIECE)
    assert t.failed(begin(t, A).claim, CUT, 1.0, reached=5000)

    step = begin(t, B, now=1.0)
    assert (step.start, step.stop) == (0, PIECE)
    assert t.failed(step.claim, GONE, 1.0)
    assert begin(t, A, now=10.0).start == 0


def test_another_source_begins_elsewhere_while_there_is_something_else():
    """What is there of a piece is worth waiting for its source."""
    t = transfer(A, B, size=3 * PIECE)
    assert t.failed(begin(t, A).claim, CUT, 1.0, reached=5000)

    step = begin(t, B, now=1.0)
    assert (step.start, step.stop) == (PIECE, 3 * PIECE)


def test_a_source_that_cuts_every_connection_is_requested_as_long_as_it_gets_farther():
    """What the policy calls progress makes up for the failure behind it; less does not."""
    t = transfer(A, size=PIECE, transient=RetrySchedule(attempts=2), progress=1 << 20)
    for reached in range(1 << 20, PIECE, 1 << 20):
        step = begin(t, A)
        assert step.start == reached - (1 << 20)
        assert t.failed(step.claim, CUT, 0.0, reached=reached)
    assert t.failed(begin(t, A).claim, CUT, 0.0, reached=PIECE - 1)

    assert t.next(0.0) == Fail({A: CUT})


def test_two_sources_that_undo_each_others_prefixes_run_out_of_attempts():
    """Only what got farther than anything before counts as progress."""
    t = transfer(A, B, size=PIECE, transient=RetrySchedule(attempts=3))
    count = 0
    while isinstance(step := t.next(0.0), Request):
        count += 1
        assert step.start in (0, 1 << 20) and count < 20
        t.failed(step.claim, CUT, 0.0, reached=step.start + (1 << 20) if step.start == 0 else 0)

    assert isinstance(step, Fail) and count >= 6


def test_what_a_corrupt_sender_began_is_not_resumed():
    """Marked corrupt for one piece, it is requested again for the other from its start."""
    t = transfer(A, size=2 * PIECE)
    one, two = begin(t, A, allowed=2), begin(t, A, allowed=2)
    assert t.failed(two.claim, CUT, 0.0, reached=two.start + 5000)
    t.piece_mismatch(one.claim, WRONG)
    send(t, EARLIER, 0)

    assert begin(t, A, now=10.0).start == PIECE


def test_the_longest_wait_that_a_server_asks_for_is_kept():
    """Several connections are refused at once, with different words: one failure, but none comes back before the last."""
    t = transfer(A, size=9 * PIECE)
    one, two = begin(t, A, allowed=2), begin(t, A, allowed=2)
    assert t.failed(one.claim, replace(BUSY, retry_after=1.0), 0.0)
    assert t.failed(two.claim, replace(BUSY, retry_after=30.0), 0.0)

    assert t.next(0.0) == Backoff(seconds=30.0)


def test_a_source_that_sends_everything_overwrites_every_partial_piece():
    """A piece has one sender: the first source does not resume after what another has written there."""
    t = transfer(A, B)
    one, two = begin(t, A, allowed=2), begin(t, B, allowed=2)
    for request, stop in (two, two.start + 1000), (one, one.start + 1000):
        assert t.failed(request.claim, CUT, 0.0, reached=stop)
    whole = begin(t, now=99.0, allowed=2)

    assert t.claim_all(whole.claim)
    for piece in range(3):
        assert t.may_write(whole.claim, piece)
        t.completed(whole.claim, piece, right(piece), 99.0)
    t.ended(whole.claim)
    t.digest_mismatch(WRONG)

    other = begin(t, now=200.0)
    assert other.locator != whole.locator and other.start % PIECE == 0
    t.ended(other.claim)
