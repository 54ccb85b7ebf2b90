"""What goes to standard error: messages for people, or events for programs, never a mixture."""

from __future__ import annotations

import json
from typing import Any

import pytest
from builders import CalledCli, Cli, Ran, lock_of, write_lock

EVENTS = ("--progress", "json")


def events(ran: Ran) -> list[dict[str, Any]]:
    """Every line of standard error, which must be an event each."""
    return [json.loads(line) for line in ran.err.splitlines()]


@pytest.fixture
def stale(cli: Cli) -> Cli:
    """A lockfile next to a manifest that it was not made from, with a source where a file is missing."""
    write_lock(cli.folder, lock_of({"m@1": {"v": {"a": b"aaa", "b": b"b"}}}, sources=["src"]))
    text = 'schema = 1\n[models.m]\nversion = "1"\nsources = ["src"]\n[models.m.variants.v]\n'
    (cli.folder / "models.toml").write_text(text)
    (cli.folder / "src").mkdir()
    (cli.folder / "src" / "a").write_bytes(b"aaa")
    return cli


@pytest.mark.parametrize("command", ["plan", "status", "gc", "verify", "du"])
def test_a_warning_is_an_event_where_events_are_asked_for(command: str, stale: Cli):
    """Every line of the stream can be read in the same way."""
    heard = events(stale.run(command, *EVENTS))

    warned = [row for row in heard if row["event"] == "Warning"]
    assert len(warned) == 1 and "was not made from" in warned[0]["text"]


def test_a_failure_ends_the_events_with_what_went_wrong(stale: Cli):
    """In the stream too, with its code and hint; what --json prints is untouched."""
    ran = stale.run("ensure", "m", "--json", *EVENTS)

    heard = events(ran)
    assert ran.code == 5
    assert {"Warning", "FetchesPlanned", "SourceFailed", "Failed"} <= {row["event"] for row in heard}
    reported = ran.json["error"]
    assert heard[-1] == {"event": "Failed"} | {key: reported[key] for key in ("code", "message", "hint")}


def test_displaced_files_are_reported_once(stale: Cli):
    """They are reported as an event, not again in words."""
    (stale.folder / "src" / "b").write_bytes(b"b")
    stale.ok("ensure", "m")
    path = stale.root / "models/m@1/v/b"
    path.unlink()
    path.write_bytes(b"mine")

    heard = events(stale.ok("ensure", "m", *EVENTS))

    assert [row["event"] for row in heard].count("Displaced") == 1
    assert not [row for row in heard if row["event"] == "Info"]


@pytest.mark.parametrize("asked", [EVENTS, ("--progress=json",)])
def test_a_bad_command_line_is_an_event_too(asked: tuple[str, ...], cli: Cli):
    """Also where it could not be understood."""
    ran = cli.run("ensure", *asked, "--nonsense")

    (row,) = events(ran)
    assert ran.code == 2 and row["event"] == "Failed" and row["code"] == "INVALID_CONFIG"


def test_people_read_words(stale: Cli):
    """Without the option nothing changes."""
    ran = stale.run("ensure", "m")

    assert ran.err.startswith("warning: ") and "\nerror: " in ran.err and "\nhint: " in ran.err
    assert stale.run("ensure", "m", "--quiet").err.startswith("error: ")


def test_a_failed_check_of_the_doctor_is_a_failure(cli: Cli):
    """Its exit code, its ``ok`` and its checks agree, and each failed one has a hint."""
    (cli.root / "modelstow.json").parent.mkdir(parents=True)
    (cli.root / "modelstow.json").write_text('{"format": 99, "epoch": "x"}')

    ran = cli.run("doctor", "--json")

    failed = {check["name"]: check["hint"] for check in ran.json["checks"] if not check["ok"]}
    assert (ran.code, ran.json["ok"], "store" in failed, all(failed.values())) == (1, False, True, True)
    assert "store" in ran.json["error"]["message"]


def test_a_terminal_with_few_characters_shows_the_others_as_escapes(cli: CalledCli):
    """No path and no message ends in a traceback."""
    lock = lock_of({"m@1": {"v": {"x": b"y"}}}, sources=["src"])
    folder = cli.folder / "ünïcode"
    folder.mkdir()
    write_lock(folder, lock)
    (folder / "src").mkdir()
    (folder / "src/x").write_bytes(b"y")

    places = ("--lock", folder / "models.lock", "--root", folder / "root")
    ran = cli.in_a_process().run("ensure", "m", *places, PYTHONIOENCODING="ascii")

    assert ran.code == 0 and "\\xfcn" in ran.out


def test_du_reports_what_is_in_quarantine(cli: Cli):
    """It takes room, and no other command reports it."""
    lock = lock_of({"m@1": {"v": {"x": b"y"}}}, sources=["src"])
    write_lock(cli.folder, lock)
    (cli.folder / "src").mkdir()
    (cli.folder / "src/x").write_bytes(b"y")
    path = cli.root / "models/m@1/v/x"
    cli.ok("ensure", "m")
    path.unlink()
    path.write_bytes(b"edited by me")
    cli.ok("ensure", "m")

    reported = cli.ok("du")
    assert "12 B of it in quarantine, which `modelstow gc --quarantine` empties" in reported.out
    assert cli.ok("du", "--json").json["totals"]["quarantine"] == 12
    cli.ok("gc", "--quarantine")
    assert "quarantine" not in cli.ok("du").out
