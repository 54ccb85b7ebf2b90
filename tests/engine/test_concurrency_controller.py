"""How many connections a blob uses: it grows while that helps, and not where the proof could not follow."""

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from modelstow.reconcile.settings import Settings
from modelstow.reconcile.transfer.concurrency import ConcurrencyController

MB = 1_000_000


def drive(
    controller: ConcurrencyController,
    rate_of,
    seconds: float,
    *,
    proof: float | None = None,
    limit: float | None = None,
    running_of=lambda allowed: allowed,
) -> list[int]:
    """Let bytes arrive at ``rate_of(connections)`` a second; how many were allowed at each tenth of a second."""
    now, received, seen = 0.0, 1.0, []
    while now < seconds:
        running = running_of(controller.allowed)
        seen.append(controller.update(now, int(received), running, proof, limit))
        received += rate_of(running) * 0.05
        now += 0.05
    return seen


def test_it_grows_at_once_where_each_connection_is_capped():
    """1, 4, 8 within half a second: a capped server is the common case of a slow one."""
    seen = drive(ConcurrencyController(8), lambda running: running * 20 * MB, 0.6)

    assert seen[0] == 1 and seen[-1] == 8


def test_it_goes_back_where_more_do_not_help_and_tries_again_later():
    """A line that is full gains nothing from further connections; after five seconds it may be another line."""
    seen = drive(ConcurrencyController(8), lambda running: 14 * MB, 20.0)

    assert max(seen) == 4 and seen[40] == 1
    assert seen.count(4) < len(seen) / 4


def test_it_does_not_grow_where_sha256_could_not_follow():
    """Half the rate of the proof is near enough to the bound."""
    assert set(drive(ConcurrencyController(8), lambda running: 1_000 * MB, 3.0, proof=1_800 * MB)) == {1}
    assert max(drive(ConcurrencyController(8), lambda running: 100 * MB * running, 3.0, proof=1_800 * MB)) == 8


def test_it_does_not_grow_where_the_limit_is_reached():
    """More connections would only lose what is on its way over one that gives up its range; below the limit they help."""
    assert set(drive(ConcurrencyController(8), lambda running: 38 * MB, 3.0, limit=40 * MB)) == {1}
    assert max(drive(ConcurrencyController(8), lambda running: min(40, 5 * running) * MB, 3.0, limit=40 * MB)) == 8


def test_it_does_not_judge_by_connections_that_never_ran():
    """Where no connection is free the step is taken back, and nothing is learnt from it."""
    controller = ConcurrencyController(8)
    drive(controller, lambda running: 20 * MB * running, 3.0, running_of=lambda allowed: 1)
    controller.update(3.0, 1 << 40, 1, None)

    freed = [
        controller.update(3.0 + n / 20, (1 << 40) + n * 20 * MB * controller.allowed, controller.allowed, None)
        for n in range(12)
    ]
    assert freed[-1] == 8


@given(st.lists(st.floats(0, 1e10), max_size=200), st.integers(1, 16))
def test_it_never_allows_less_than_one_or_more_than_the_most(steps, most):
    """Whatever arrives."""
    controller, received, now = ConcurrencyController(most), 0.0, 0.0
    for step in steps:
        received, now = received + step, now + 0.07
        assert 1 <= controller.update(now, int(received), controller.allowed, None) <= most


def test_a_limited_rate_is_not_spread_over_connections_that_would_seem_dead(tmp_path: Path):
    """Each has 64 KiB a second at least; there is always one, and never more than were asked for."""

    def connections(limit: float | None) -> int:
        return Settings(root=tmp_path, connections=8, limit_rate=limit).useful_connections

    assert [connections(limit) for limit in (None, 50e6, 300_000, 65_536, 1000)] == [8, 8, 4, 1, 1]
