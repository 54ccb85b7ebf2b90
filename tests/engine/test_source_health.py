"""Sources that failed recently are requested last, for a while."""

from modelstow.reconcile.transfer.source_health import FailureTable


def test_a_source_that_was_exhausted_long_ago_has_all_its_attempts_again():
    """What is old counts nowhere: neither for the order nor for the attempts, and a new failure does not revive it."""
    now = [0.0]
    table = FailureTable(ttl_s=300.0, clock=lambda: now[0])
    table.note("host", "SOURCE_UNAVAILABLE", "down", exhausted=True)
    table.note("host", "SOURCE_UNAVAILABLE", "still down")
    assert "host" in table and table.exhausted(["host"])

    now[0] = 1000.0
    assert not table.any
    assert "host" not in table and not table.exhausted(["host"]) and table.active() == {}
    table.note("host", "SOURCE_UNAVAILABLE", "down again")
    assert "host" in table and not table.exhausted(["host"])


def test_success_forgets_what_failed_before():
    """Of the keys it is given, and no other."""
    table = FailureTable()
    table.note("one", "NETWORK_TIMEOUT", "late", exhausted=True)
    table.note("two", "NETWORK_TIMEOUT", "late")

    table.clear(["one"])

    assert set(table.active()) == {"two"} and table.any
    table.clear(["two"])
    assert not table.any
