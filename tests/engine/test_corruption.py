"""Corruption isolation: its rules by example, and its laws in a world of correct and corrupt senders without time."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from modelstow.reconcile.transfer.corruption import CorruptionIsolation
from modelstow.reconcile.transfer.state import Held

A, B, C, EARLIER = "mem://a", "mem://b", "mem://c", "an earlier run"


def pieces(*senders: str, corrupt: str = "") -> dict[int, Held]:
    """One piece of each sender, in order; those that *corrupt* sent are wrong."""
    return {index: Held(sender, b"wrong" if sender == corrupt else b"right") for index, sender in enumerate(senders)}


# ---- examples


def test_a_single_sender_is_corrupt():
    """All of it is invalidated, and the sender may not serve."""
    isolation = CorruptionIsolation(retrusts=1)

    assert isolation.digest_mismatch(pieces(A, A), [A, B]) == ((0, 1), (A,))
    assert not isolation.may_serve(A) and isolation.may_serve(B)


def test_the_usable_sender_of_most_pieces_becomes_the_reference_source():
    """The pieces of the others are invalidated, and only it may serve."""
    isolation = CorruptionIsolation(retrusts=1)

    assert isolation.digest_mismatch(pieces(A, B, B, C), [A, B, C]) == ((0, 3), ())
    assert [isolation.may_serve(source) for source in (A, B, C)] == [False, True, False]


def test_of_senders_of_equally_many_pieces_the_first_usable_one_is_the_reference_source():
    """The order is that of the sources, not that of the pieces."""
    isolation = CorruptionIsolation(retrusts=1)
    isolation.digest_mismatch(pieces(A, B), [B, A])

    assert isolation.reference == B


def test_a_sender_that_cannot_serve_is_no_reference_source():
    """Neither one without attempts left nor an earlier run, however many pieces it sent."""
    isolation = CorruptionIsolation(retrusts=1)
    isolation.digest_mismatch(pieces(EARLIER, EARLIER, B, B, B, A), [A, C])

    assert isolation.reference == A


def test_a_corrupt_sender_is_no_reference_source():
    """It was marked for one piece while its others were held."""
    isolation = CorruptionIsolation(retrusts=1)
    isolation.mark_corrupt(A)
    isolation.digest_mismatch(pieces(A, A, B), [A, B])

    assert isolation.reference == B


def test_where_no_sender_can_serve_none_is_marked_corrupt():
    """Everything is invalidated: which of them sent corrupt data remains unknown."""
    isolation = CorruptionIsolation(retrusts=1)

    assert isolation.digest_mismatch(pieces(A, B), [C]) == ((0, 1), ())
    assert all(map(isolation.may_serve, (A, B, C)))


def test_a_digest_that_matches_proves_the_senders_of_replaced_pieces_corrupt():
    """Of the senders whose pieces were replaced, only one whose piece had another hash is corrupt."""
    isolation = CorruptionIsolation(retrusts=1)
    isolation.digest_mismatch(pieces(A, B, C, C, corrupt=B), [A, B, C])

    assert isolation.verified(pieces(C, C, C, C)) == (B,)


def test_pieces_that_any_reference_source_replaced_count_in_the_end():
    """The first reference source was corrupt itself; what it replaced is compared with the pieces of the second."""
    isolation = CorruptionIsolation(retrusts=1)
    isolation.digest_mismatch(pieces(A, A, B, corrupt=B), [A, B, C])
    isolation.digest_mismatch(pieces(A, A, A, corrupt=A), [A, B, C])
    isolation.digest_mismatch(pieces(C, B, C), [B, C])

    assert isolation.reference == C
    assert isolation.verified(pieces(C, C, C)) == (B,)


def test_a_digest_that_matches_at_once_proves_nothing_corrupt():
    """Nothing was replaced."""
    assert CorruptionIsolation(retrusts=1).verified(pieces(A, B)) == ()


def test_a_second_mismatch_proves_the_reference_source_corrupt():
    """Now all pieces are its own. The others may serve again, and everything is invalidated."""
    isolation = CorruptionIsolation(retrusts=1)
    isolation.digest_mismatch(pieces(A, A, B), [A, B])

    assert isolation.digest_mismatch(pieces(A, A, A), [A, B]) == ((0, 1, 2), (A,))
    assert isolation.reference is None
    assert not isolation.may_serve(A) and isolation.may_serve(B)


def test_a_reference_source_that_cannot_serve_any_more_is_released():
    """The others may serve; releasing one that is not the reference source changes nothing."""
    isolation = CorruptionIsolation(retrusts=1)
    isolation.digest_mismatch(pieces(A, A, B), [A, B])
    isolation.release_reference(B)
    assert isolation.reference == A

    isolation.release_reference(A)

    assert isolation.may_serve(A) and isolation.may_serve(B)


def test_a_reference_source_that_is_marked_corrupt_is_released():
    """One wrong piece is enough, where its hash was verified before."""
    isolation = CorruptionIsolation(retrusts=1)
    isolation.digest_mismatch(pieces(A, A, B), [A, B])

    isolation.mark_corrupt(A)

    assert not isolation.may_serve(A) and isolation.may_serve(B)


def test_a_corrupt_source_is_trusted_again_as_often_as_allowed():
    """Each source by itself, and only one with attempts left."""
    isolation = CorruptionIsolation(retrusts=1)
    isolation.mark_corrupt(A)
    isolation.mark_corrupt(B)

    isolation.retrust([A])
    assert isolation.may_serve(A) and not isolation.may_serve(B)
    isolation.mark_corrupt(A)
    isolation.retrust([A, B])
    assert not isolation.may_serve(A) and isolation.may_serve(B)


def test_a_blob_without_pieces_has_no_sender():
    """Nothing to invalidate, no one to mark."""
    assert CorruptionIsolation(retrusts=1).digest_mismatch({}, [A]) == ((), ())


# ---- laws


@dataclass
class World:
    """Sources that never fail; each sends the same pieces of the blob wrong every time."""

    wrong: Mapping[str, frozenset[int]]  # by locator
    first: Mapping[int, str]  # by piece: its sender in the first round
    retrusts: int
    isolation: CorruptionIsolation = field(init=False)
    marked: set[str] = field(default_factory=set)
    rounds: int = 0

    def run(self) -> bool:
        """Fetch missing pieces and isolate until the digest matches, or no source may serve; whether it matches."""
        self.isolation = CorruptionIsolation(self.retrusts)
        held = {index: self.sent(index, sender) for index, sender in self.first.items()}
        while any(piece.hash != b"right" for piece in held.values()):
            self.rounds += 1
            assert self.rounds <= 2 * (self.retrusts + 1) * len(self.wrong) + 2, "it does not end"
            isolation = self.isolation.digest_mismatch(held, list(self.wrong))
            assert isolation.invalidate, "nothing changed"
            self.marked |= set(isolation.corrupt)
            if not any(map(self.isolation.may_serve, self.wrong)):
                self.isolation.retrust(self.wrong)
            usable = [locator for locator in self.wrong if self.isolation.may_serve(locator)]
            if not usable:
                return False
            for number, index in enumerate(isolation.invalidate):
                held[index] = self.sent(index, usable[number % len(usable)])
        self.marked |= set(self.isolation.verified(held))
        return True

    def sent(self, index: int, sender: str) -> Held:
        wrong = index in self.wrong.get(sender, frozenset())
        return Held(sender, f"{sender} {index}".encode() if wrong else b"right")


@st.composite
def worlds(draw: st.DrawFn) -> World:
    locators = [A, B, C][: draw(st.integers(1, 3))]
    wrong = {locator: draw(st.frozensets(st.integers(0, 5), max_size=3)) for locator in locators}
    first = dict(enumerate(draw(st.lists(st.sampled_from(locators), min_size=1, max_size=6))))
    return World(wrong, first, retrusts=draw(st.integers(0, 2)))


@given(worlds())
@settings(max_examples=300)
def test_only_corrupt_sources_are_marked_corrupt(world: World):
    """However the pieces are mixed: a correct source is never marked."""
    world.run()

    assert world.marked <= {locator for locator, wrong in world.wrong.items() if wrong}


@given(worlds())
@settings(max_examples=300)
def test_one_correct_source_is_enough(world: World):
    """The digest matches at last where any source sends every piece right."""
    matches = world.run()

    assert matches or all(wrong & set(world.first) for wrong in world.wrong.values())


@given(worlds())
@settings(max_examples=300)
def test_isolation_ends(world: World):
    """After a number of rounds that follows from the sources and their second chances."""
    world.run()
