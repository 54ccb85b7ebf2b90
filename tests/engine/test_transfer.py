"""The machine that decides a transfer: its rules by example, and its laws under sources that fail, lie and throttle."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from strategies import Reply, Sim, crowds

from cas.pieces import PIECE, piece_count
from reconcile.execution.transfer import EARLIER, Ask, Fact, GiveUp, Prove, RetryPolicy, Transfer, Wait

CUT = Fact(code="SOURCE_UNAVAILABLE", what="cut", transient=True)
GONE = Fact(code="INCOMPLETE_DOWNLOAD", what="HTTP 404")
BUSY = Fact(code="RATE_LIMIT", what="HTTP 429", transient=True, throttled=True)
WRONG = Fact(code="CHECKSUM_FAIL", what="sent wrong bytes")
A, B, C = "mem://a", "mem://b", "mem://c"
THREE = 3 * PIECE - 5


def transfer(
    *locators: str, size: int = THREE, late=(), policy: RetryPolicy = RetryPolicy(), jitter: float = 1.0
) -> Transfer:
    return Transfer(size, locators, policy, frozenset(late), jitter=lambda: jitter)


def send(t: Transfer, sender: str, *pieces: int, lie: bool = False) -> None:
    for piece in pieces:
        t.hold(piece, sender, right(piece) if not lie else f"{sender} lies".encode())


def right(piece: int) -> bytes:
    return b"right %d" % piece


def asked(t: Transfer, now: float = 0.0) -> str:
    step = t.next(now)
    assert isinstance(step, Ask), step
    return step.locator


# ---- examples


def test_the_first_source_is_asked_for_everything():
    """The best source, for the whole run of missing pieces in bytes."""
    assert transfer(A, B).next(0) == Ask(locator=A, start=0, stop=THREE)


def test_a_source_named_twice_is_one_source():
    """Its failure is told once."""
    t = transfer(A, A)
    t.failed(A, GONE, 0)

    assert t.next(0) == GiveUp({A: GONE})


def test_pieces_that_are_held_are_not_asked_for():
    """What an earlier run left is skipped: the first run of missing pieces comes first."""
    t = transfer(A, size=6 * PIECE)
    send(t, EARLIER, 0, 3)

    assert t.next(0) == Ask(locator=A, start=PIECE, stop=3 * PIECE)
    send(t, A, 1, 2)
    assert t.next(0) == Ask(locator=A, start=4 * PIECE, stop=6 * PIECE)


def test_a_full_blob_is_to_be_proven():
    """Nothing is asked when every piece is there; a blob of no bytes has none."""
    t = transfer(A)
    send(t, A, 0, 1, 2)

    assert t.next(0) == Prove() and t.proven() == ()
    assert transfer(size=0).next(0) == Prove()


def test_without_a_source_it_gives_up():
    """No locator, no failure to tell."""
    assert transfer().next(0) == GiveUp({})


def test_a_source_that_failed_lately_is_asked_last_and_not_never():
    """Late sources stand behind the others, in their order."""
    t = transfer(A, B, C, late=[A, B])

    assert asked(t) == C
    t.failed(C, GONE, 0)
    assert asked(t) == A
    t.failed(A, GONE, 0)
    assert asked(t) == B


def test_where_all_failed_lately_the_first_is_asked_at_once():
    """No other is left, so nobody waits."""
    assert asked(transfer(A, late=[A])) == A


def test_a_late_source_has_one_attempt_until_it_sends_a_piece():
    """Its patience comes back with progress."""
    t = transfer(A, late=[A])
    t.failed(A, CUT, 0)
    assert t.next(0) == GiveUp({A: CUT})

    t = transfer(A, late=[A])
    send(t, A, 0)
    t.failed(A, CUT, 0)
    assert isinstance(t.next(0), Wait)


def test_while_one_source_pauses_another_is_asked():
    """A transient failure costs its source a pause, and nobody else."""
    t = transfer(A, B)
    t.failed(A, CUT, 0)

    assert asked(t) == B
    t.failed(B, CUT, 0)
    assert t.next(0) == Wait(seconds=1.0)
    assert asked(t, 1.0) == A


def test_pauses_double_to_the_longest_and_progress_starts_them_anew():
    """1, 2, 4, 8 seconds; a new piece gives the source its patience back."""
    t = transfer(A)
    pauses, now = [], 0.0
    for _ in range(4):
        t.failed(A, CUT, now)
        step = t.next(now)
        assert isinstance(step, Wait)
        pauses.append(step.seconds)
        now += step.seconds
    assert pauses == [1.0, 2.0, 4.0, 8.0]

    send(t, A, 0)
    t.failed(A, CUT, now)

    assert t.next(now) == Wait(seconds=1.0)


def test_attempts_in_a_row_end_a_source():
    """Five failures without a new piece, then it is over, and its reason is told."""
    t = transfer(A)
    for _ in range(4):
        t.failed(A, CUT, -1000)
        assert asked(t) == A
    t.failed(A, CUT, 0)

    assert t.next(1e9) == GiveUp({A: CUT})


def test_a_throttled_source_has_its_own_patience_and_pauses():
    """429 and 503 count apart from broken connections."""
    t = transfer(A)
    for _ in range(9):
        t.failed(A, BUSY, -1000)
    for _ in range(4):
        t.failed(A, CUT, -1000)
    assert asked(t, 0) == A
    t.failed(A, BUSY, 0)

    assert t.next(1e9) == GiveUp({A: BUSY})


@pytest.mark.parametrize(
    ("retry_after", "pause"), [(None, 5.0), (0.0, 5.0), (-9.0, 5.0), (2.0, 5.0), (77.0, 77.0), (1e9, 300.0)]
)
def test_retry_after_is_honoured_up_to_its_cap(retry_after, pause):
    """At least the pause of the policy, at most five minutes."""
    t = transfer(A)
    t.failed(A, Fact(code="RATE_LIMIT", what="429", transient=True, throttled=True, retry_after=retry_after), 0)

    assert t.next(0) == Wait(seconds=pause)


def test_jitter_shortens_a_pause_by_half_at_most():
    """So that many clients do not come back together."""
    t = transfer(A, jitter=0.0)
    t.failed(A, CUT, 0)

    assert t.next(0) == Wait(seconds=0.5)


def test_a_permanent_failure_ends_the_source_for_this_blob():
    """The next one takes over at once, from where the first one stopped."""
    t = transfer(A, B)
    send(t, A, 0)
    t.failed(A, GONE, 0)

    assert t.next(0) == Ask(locator=B, start=PIECE, stop=THREE)
    t.failed(B, GONE, 0)
    assert t.next(0) == GiveUp({A: GONE, B: GONE})


def test_one_sender_of_wrong_bytes_is_convicted_and_another_takes_over():
    """Everything it sent is struck off."""
    t = transfer(A, B)
    send(t, A, 0, 1, 2, lie=True)

    assert t.wrong(WRONG) == ((0, 1, 2), (A,))
    assert t.next(0) == Ask(locator=B, start=0, stop=THREE)


def test_where_none_can_take_over_the_convicted_is_asked_once_more():
    """Once: a proxy may have been wrong. Then it is given up with the reason."""
    t = transfer(A, B)
    t.failed(B, GONE, 0)
    send(t, A, 0, 1, 2, lie=True)
    t.wrong(WRONG)

    assert asked(t) == A
    send(t, A, 0, 1, 2, lie=True)
    t.wrong(WRONG)

    assert t.next(0) == GiveUp({A: WRONG, B: GONE})


def test_of_two_senders_the_purifier_replaces_the_pieces_of_the_other():
    """Who sent most is kept; when the whole is right then, the other is proven a liar."""
    t = transfer(A, B)
    send(t, A, 0, lie=True)
    t.failed(A, CUT, 0)
    send(t, B, 1, 2)

    assert t.wrong(WRONG) == ((0,), ())
    assert t.next(0) == Ask(locator=B, start=0, stop=PIECE)
    send(t, B, 0)

    assert t.next(0) == Prove() and t.proven() == (A,)


def test_a_purifier_that_lied_is_convicted_and_the_honest_one_is_not():
    """The honest one then serves the whole, and nobody says it lied."""
    t = transfer(A, B)
    send(t, A, 0, 1, lie=True)
    t.failed(A, CUT, -1000)
    send(t, B, 2)

    assert t.wrong(WRONG) == ((2,), ())
    assert asked(t) == A, "while purifying only the purifier is asked"
    send(t, A, 2, lie=True)

    assert t.wrong(WRONG) == ((0, 1, 2), (A,))
    assert t.next(0) == Ask(locator=B, start=0, stop=THREE)
    send(t, B, 0, 1, 2)
    assert t.proven() == ()


def test_wrong_pieces_of_an_earlier_run_cost_only_themselves():
    """Nobody of today is convicted for what stood there before."""
    t = transfer(A)
    send(t, EARLIER, 0, lie=True)
    send(t, A, 1, 2)

    struck, convicted = t.wrong(WRONG)

    assert (struck, convicted) == ((0,), ())
    send(t, A, 0)
    assert t.proven() == (EARLIER,)


def test_a_purifier_that_fails_for_good_makes_room_for_the_others():
    """What it could not replace, another may."""
    t = transfer(A, B, C)
    send(t, A, 0, 1, lie=True)
    t.failed(A, CUT, -1000)
    send(t, B, 2)
    t.wrong(WRONG)
    t.failed(A, GONE, 0)

    assert asked(t) in (B, C)


def test_a_purifier_caught_by_a_piece_makes_room_for_the_others():
    """A piece that cannot be right convicts it; an honest source is still there and is asked."""
    t = transfer(A, B)
    send(t, A, 0, 1, lie=True)
    t.failed(A, CUT, -1000)
    send(t, B, 2)
    t.wrong(WRONG)
    assert asked(t) == A
    t.wrong_piece(2, A, WRONG)

    assert asked(t) == B


def test_a_piece_that_cannot_be_right_convicts_at_once():
    """The next source is asked for that piece; where there is none, the same once more."""
    t = transfer(A, B)
    t.wrong_piece(0, A, WRONG)
    assert asked(t) == B
    t.wrong_piece(0, B, WRONG)
    assert asked(t) in (A, B)
    t.wrong_piece(0, A, WRONG)
    t.wrong_piece(0, B, WRONG)

    assert t.next(0) == GiveUp({A: WRONG, B: WRONG})


def test_where_all_senders_are_over_none_is_convicted_of_what_another_may_have_done():
    """Who lied is not known; the pieces are struck off and a third serves the whole."""
    t = transfer(A, B, C, late=[C])
    send(t, A, 0, lie=True)
    t.failed(A, GONE, 0)
    send(t, B, 1, 2)
    t.failed(B, GONE, 0)

    struck, convicted = t.wrong(WRONG)

    assert convicted == ()
    assert 0 in struck and asked(t) == C


@pytest.mark.parametrize("locators", [(A,), (A, B), ()])
def test_a_blob_of_no_bytes_that_is_wrong_ends(locators):
    """Nobody can make it right, so it is given up and not proven for ever."""
    t = transfer(*locators, size=0)
    steps = 0
    while isinstance(t.next(0), Prove) and steps < 20:
        t.wrong(WRONG)
        steps += 1

    assert isinstance(t.next(0), GiveUp)


# ---- laws


@dataclass
class World:
    """Drives a transfer against simulated sources and keeps an account of what they did."""

    sims: Mapping[str, Sim]
    pieces: int
    policy: RetryPolicy
    earlier: Mapping[int, str] = field(default_factory=dict)  # piece -> who sent it, right unless it lies about it
    jumps: tuple[float, ...] = (0.0,)
    now: float = 1_000.0
    steps: int = 0
    waits: list[float] = field(default_factory=list)
    held: dict[int, bytes] = field(default_factory=dict)
    lied: set[str] = field(default_factory=set)  # who ever sent a wrong piece
    convicted: set[str] = field(default_factory=set)  # by ``wrong``
    blamed: tuple[str, ...] = ()  # by ``proven``
    requests: dict[str, int] = field(default_factory=dict)
    # Failures in a row without a new piece: plain and throttled, as the policy counts them.
    row: dict[str, list[int]] = field(default_factory=dict)
    gone: set[str] = field(default_factory=set)
    fresh: set[str] = field(default_factory=set)  # late ones that never sent a piece

    def run(self) -> Prove | GiveUp:
        t = Transfer(
            self.pieces * PIECE,
            tuple(self.sims),
            self.policy,
            frozenset(locator for locator, sim in self.sims.items() if sim.late),
            jitter=lambda: (self.steps * 0.37) % 1.0,
        )
        self.fresh = {locator for locator, sim in self.sims.items() if sim.late}
        for piece, sender in self.earlier.items():
            self._hold(t, piece, sender)
        while True:
            self.steps += 1
            assert self.steps <= self.most_steps(), "it does not end"
            step = t.next(self.now)
            match step:
                case Ask():
                    self._answer(t, step)
                case Wait(seconds=seconds):
                    self.waits.append(seconds)
                    self.now += seconds
                case Prove():
                    if all(self.held.get(piece) == right(piece) for piece in range(self.pieces)):
                        self.blamed = t.proven()
                        return step
                    struck, convicted = t.wrong(WRONG)
                    assert struck, "nothing changed"
                    for piece in struck:
                        del self.held[piece]
                    self.convicted |= set(convicted)
                case GiveUp():
                    return step

    def most_steps(self) -> int:
        """Each source is convicted twice at most and purifies as often; between two pieces all may lose their patience."""
        rounds = 4 * len(self.sims) + 4
        failures = 2 * len(self.sims) * (self.policy.attempts + self.policy.throttled_attempts)
        return 2 * rounds * (self.pieces + 1) * (failures + 2)

    def _hold(self, t: Transfer, piece: int, sender: str) -> None:
        sim = self.sims.get(sender, Sim())
        lies = piece in sim.lies and self.requests.get(sender, 0) <= sim.lies_for
        hash_ = f"{sender} lies about {piece}".encode() if lies or sender == "mem://liar of old" else right(piece)
        if hash_ != right(piece):
            self.lied.add(sender)
        self.held[piece] = hash_
        self.row[sender] = [0, 0]
        self.fresh.discard(sender)
        t.hold(piece, sender, hash_)

    def _answer(self, t: Transfer, ask: Ask) -> None:
        assert ask.start % PIECE == 0 and ask.start < ask.stop <= self.pieces * PIECE
        wanted = range(ask.start // PIECE, piece_count(ask.stop))
        assert not any(piece in self.held for piece in wanted), "a piece is asked for that is held"
        sim, number = self.sims[ask.locator], self.requests.get(ask.locator, 0)
        self.requests[ask.locator] = number + 1
        reply = sim.replies[number] if number < len(sim.replies) else Reply()
        self.now += self.jumps[self.steps % len(self.jumps)]
        for piece in wanted[: reply.pieces]:
            self._hold(t, piece, ask.locator)
        if not reply.then:
            return
        row = self.row.setdefault(ask.locator, [0, 0])
        if reply.then == "gone":
            self.gone.add(ask.locator)
            fact = GONE
        elif reply.then == "cut":
            row[0] += 1
            fact = Fact(code="SOURCE_UNAVAILABLE", what="cut", transient=True, retry_after=reply.retry_after)
        else:
            row[1] += 1
            fact = Fact(code="RATE_LIMIT", what="429", transient=True, throttled=True, retry_after=reply.retry_after)
        t.failed(ask.locator, fact, self.now)

    def over(self, locator: str) -> bool:
        """Whether this source gave every reason not to be asked again."""
        plain, throttled = self.row.get(locator, [0, 0])
        if locator in self.fresh:
            return locator in self.gone or plain + throttled >= 1
        return locator in self.gone or plain >= self.policy.attempts or throttled >= self.policy.throttled_attempts

    def honest(self) -> set[str]:
        return {locator for locator, sim in self.sims.items() if not sim.lies}


policies = st.builds(
    RetryPolicy,
    attempts=st.integers(1, 5),
    first_pause_s=st.sampled_from([0.0, 0.1, 1.0]),
    throttled_attempts=st.integers(1, 5),
    throttled_pause_s=st.sampled_from([0.0, 5.0]),
    retry_after_cap_s=st.sampled_from([0.0, 300.0]),
)
jumps = st.lists(st.sampled_from([0.0, 0.001, 1.0, 1e6]), min_size=1, max_size=3).map(tuple)


@st.composite
def worlds(draw: st.DrawFn, *, with_steady: bool = False) -> World:
    sims = draw(crowds(with_steady=with_steady))
    pieces = draw(st.integers(1, 5))
    senders = st.sampled_from([*sims, EARLIER, "mem://liar of old"])
    earlier = draw(st.dictionaries(st.integers(0, pieces - 1), senders))
    return World(sims, pieces, draw(policies), earlier=earlier, jumps=draw(jumps))


@given(worlds())
@settings(max_examples=150)
def test_a_transfer_always_ends(world):
    """Whatever the sources do, within a number of steps that follows from the policy."""
    world.run()

    assert sum(world.requests.values()) <= world.steps


@given(worlds())
@settings(max_examples=150)
def test_it_never_gives_up_while_an_honest_source_could_still_serve(world):
    """Where it gives up, every honest source is over: for good, or out of patience."""
    end = world.run()

    if isinstance(end, GiveUp):
        assert [locator for locator in world.honest() if not world.over(locator)] == []
        assert set(end.failures) == set(world.sims)


@given(worlds(with_steady=True))
@settings(max_examples=150)
@example(World({A: Sim(lies=frozenset([0])), B: Sim()}, 1, RetryPolicy()))
@example(World({A: Sim((Reply(1, "gone"),), frozenset([0])), B: Sim()}, 2, RetryPolicy()))
@example(World({A: Sim((Reply(2, "cut"),), frozenset([0])), B: Sim((Reply(1, "cut"),)), C: Sim()}, 4, RetryPolicy()))
def test_it_ends_with_the_right_bytes_where_an_honest_source_can_be_reached(world):
    """One honest source that serves is enough, however many others lie."""
    end = world.run()

    assert end == Prove()
    assert world.held == {piece: right(piece) for piece in range(world.pieces)}


@given(worlds())
@settings(max_examples=150)
def test_nobody_is_said_to_have_lied_who_did_not(world):
    """Neither when the whole is wrong nor when it is right at last."""
    world.run()

    assert set(world.blamed) <= world.lied
    assert world.convicted - {EARLIER, "mem://liar of old"} <= world.lied


@given(worlds())
@settings(max_examples=150)
def test_pauses_are_bounded_by_the_policy(world):
    """No source, no clock and no Retry-After makes anybody wait longer."""
    world.run()

    p = world.policy
    longest = max(
        p.longest_pause_s,
        p.first_pause_s,
        p.throttled_pause_s * p.throttled_factor**p.throttled_attempts,
        p.retry_after_cap_s,
    )
    assert all(0 < seconds <= longest for seconds in world.waits)


@given(worlds())
def test_a_single_honest_world_makes_no_request_twice(world):
    """A source that serves what it is asked is asked as often as there are gaps, and no more."""
    for locator in world.sims:
        alone = World({locator: Sim()}, world.pieces, world.policy, earlier=dict.fromkeys(world.earlier, EARLIER))
        gaps = sum(1 for p in range(world.pieces) if p not in alone.earlier and (p == 0 or p - 1 in alone.earlier))

        assert alone.run() == Prove()
        assert alone.requests.get(locator, 0) == gaps
