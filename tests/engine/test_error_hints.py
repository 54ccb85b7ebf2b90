"""Errors say what to do next: a hint that fits what is wrong, whichever command failed."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from builders import Cli, ensurer_of, lock_of, write_lock
from origin import Fault, Origin

from modelstow import SourceUnavailableError
from modelstow.backends import NotFound, NotListable, ProtocolError, Registry, SourceError
from modelstow.backends.file import FileSource
from modelstow.backends.hf.hub import HubSource
from modelstow.backends.http.client import HttpSource
from modelstow.cas import Digest
from modelstow.reconcile.desired.lockfile import LockedBlob, LockedModel, LockedVariant, Lockfile


def manifest(cli: Cli, *sources: str) -> None:
    rows = ", ".join(f'"{source}"' for source in sources)
    text = f'schema = 1\n[models.m]\nversion = "1"\nsources = [{rows}]\n[models.m.variants.v]\n'
    (cli.folder / "models.toml").write_text(text)


def test_an_unknown_scheme_says_which_are_known():
    """In the hint, since it is what to do next."""
    with pytest.raises(SourceError, match="ftp:// is not supported") as caught:
        Registry().find("ftp://host/x")

    assert "a path" in caught.value.hint and "https://" in caught.value.hint


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_what_is_no_regular_file_says_what_is_read(make: Callable[[Path], None], tmp_path: Path):
    """A pipe or folder where a file is wanted."""
    make(tmp_path / "x")

    with pytest.raises(NotFound, match="not a regular file") as caught:
        FileSource().open(str(tmp_path / "x"))

    assert "regular files are read" in caught.value.hint


@pytest.mark.parametrize("sums", [b"not a sum\n", b"\xff\xff"])
def test_a_bad_list_of_sums_says_how_to_make_one(sums: bytes):
    """The hint also says what to do if the list cannot be corrected."""
    with Origin({"m/SHA256SUMS": sums}) as origin:
        with pytest.raises(NotListable, match="SHA256SUMS") as caught:
            HttpSource({}).listing(f"{origin.url}/m")

    assert "sha256sum" in caught.value.hint


@pytest.mark.parametrize("answer", [b"<html>", b"{}", b"[]"])
def test_an_address_that_is_no_hub_is_reported_as_such(answer: bytes):
    """The page of some other server."""
    with Origin({"api/models/org/name/revision/main": answer}) as origin:
        with pytest.raises(ProtocolError, match="the hub's response") as caught:
            HubSource({"HF_ENDPOINT": origin.url}).listing("hf://org/name")

    assert "HF_ENDPOINT" in caught.value.hint


@pytest.mark.slow
def test_a_source_that_cannot_be_reached_says_what_to_check(cli: Cli):
    """Also where the source itself has nothing to say."""
    manifest(cli, "http://127.0.0.1:9/m")

    ran = cli.run("lock", "--json")

    assert ran.code == 5
    assert "network" in ran.json["error"]["hint"] and "`files`" in ran.json["error"]["hint"]


def test_a_listed_file_that_is_not_there_says_what_to_do(cli: Cli):
    """The listing promises what the source does not have."""
    with Origin({"m/gone.bin": b"x"}) as origin:
        origin.fail("m/gone.bin", Fault(status=404, times=-1))
        manifest(cli, f"{origin.url}/m")

        ran = cli.run("lock", "--json")

    assert ran.code == 5 and "exclude" in ran.json["error"]["hint"]


def test_a_blob_without_any_source_asks_for_one(cli: Cli):
    """No network could help."""
    blob = {Digest.of(b"x"): LockedBlob(size=1)}
    model = LockedModel(variants={"v": LockedVariant(files={"x": Digest.of(b"x")})}, default="v")
    write_lock(cli.folder, Lockfile(manifest="sha256:" + "0" * 64, models={"m@1": model}, blobs=blob))

    ran = cli.run("ensure", "m")

    assert ran.code == 5
    assert "no source is configured" in ran.err and "hint: give the model `sources`" in ran.err


@pytest.mark.parametrize(
    ("argv", "word"),
    [
        (("ensure", "m", "--limit-rate", "0"), "leave it out"),
        (("which", "nothing"), "a file of a tree"),
        (("which", "."), "a file of a tree"),
        (("diff", "a.lock", "b.lock"), "modelstow lock"),
        (("status", "--lock", "."), "models.lock"),
        (("bench", "--size", "0"), "1GiB"),
    ],
)
def test_a_bad_argument_says_what_to_write(argv: tuple[str, ...], word: str, cli: Cli):
    """Exit 2, with something that can be typed."""
    ran = cli.run(*argv)

    assert ran.code == 2
    assert word in ran.err.partition("hint: ")[2]


def test_a_body_that_breaks_off_asks_for_another_try_not_for_another_lockfile(cli: Cli):
    """It shares its code with a file that is not there; the way out is another one."""
    with Origin({"m/x.bin": bytes(5000)}) as origin:
        origin.fail("m/x.bin", Fault(cut_after=1000, reset=False, times=-1))
        lock = lock_of({"m@1": {"v": {"x.bin": bytes(5000)}}}, [f"{origin.url}/m"])
        models = ensurer_of(cli.folder, lock)

        with pytest.raises(SourceUnavailableError, match="ended early") as caught:
            models.ensure("m")

    assert "run the same command again" in caught.value.hint and "upgrade" not in caught.value.hint


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (("stauts",), "did you mean `status`?"),
        (("--json", "doctor"), "a command comes first"),
        (("--root", "x", "status"), "a command comes first"),
        (("help",), "a command comes first"),
    ],
    ids=" ".join,
)
def test_a_mistyped_command_line_says_what_was_probably_meant(argv: tuple[str, ...], words: str, cli: Cli):
    """The hint names the likely command instead of listing all twenty."""
    ran = cli.run(*argv)

    assert ran.code == 2 and words in (ran.json["error"]["hint"] if ran.out else ran.err), ran


def test_a_bad_choice_of_an_option_is_not_taken_for_a_command(cli: Cli):
    """The hint is about what is wrong."""
    assert "see `modelstow status --help`" in cli.run("status", "--progress", "jsn").err


def test_a_wrong_address_is_distinguished_from_a_server_without_a_listing(cli: Cli):
    """A typo in a path is the commonest mistake of all."""
    with Origin({"m/a.bin": b"a"}, listing="none") as origin:
        manifest(cli, f"{origin.url}/mm")
        nowhere = cli.run("lock")

    assert nowhere.code == 5
    assert "nothing is at this address (HTTP 404 Not Found)" in nowhere.err and "check the address" in nowhere.err


def test_a_missing_mirror_is_reported_once(cli: Cli):
    """A mistyped folder would pass for one that holds nothing."""
    (cli.folder / "src").mkdir()
    (cli.folder / "src/a.bin").write_bytes(b"a")
    manifest(cli, "src")
    cli.ok("lock")
    (cli.folder / "mirror").mkdir()

    shown = cli.ok("ensure", "m", "--force", MODELSTOW_MIRRORS="mirror mirro").err

    assert shown.count("there is no mirror at") == 1 and f"warning: there is no mirror at {cli.folder}/mirro\n" in shown


def test_a_source_that_sends_wrong_bytes_is_named_though_another_serves(cli: Cli):
    """The fetch succeeds, and the corrupt source is still reported."""
    for folder, data in (("bad", b"wrong!!"), ("good", b"weights")):
        (cli.folder / folder).mkdir()
        (cli.folder / folder / "a.bin").write_bytes(data)
    digest = Digest.of(b"weights")
    blobs = {digest: LockedBlob(size=7, urls=("bad/a.bin", "good/a.bin"))}
    models = {"m@1": LockedModel(variants={"v": LockedVariant(files={"a.bin": digest})}, default="v")}
    write_lock(cli.folder, Lockfile(manifest="", models=models, blobs=blobs))

    reported = cli.ok("ensure", "m").err

    assert "warning:" in reported and "bad/a.bin sent corrupt data" in reported
    assert "bad/a.bin" not in cli.ok("ensure", "m", "--quiet", "--force").err
