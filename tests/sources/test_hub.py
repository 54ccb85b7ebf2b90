"""A hub keeps the contract, names digests without sending weights, and alone gets its token."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from builders import IMPATIENT, Cli, ensurer_of, lock_of, manifest_of, some_bytes, tree_of
from hub import CANARY, Hub, address_of, authorization
from origin import Fault

from modelstow.backends import (
    AccessDenied,
    NotFound,
    NotListable,
    Offline,
    ProtocolError,
    Source,
    SourceError,
    Throttled,
    join_locator,
    locator_prefixes,
    open_source,
    redact,
)
from modelstow.backends.conformance import SourceContract
from modelstow.backends.hf import hub as hub_source
from modelstow.backends.hf.hub import HubPath, HubSource, find_token

TOKEN = "hf_canary"
WEIGHTS = some_bytes(300_000, 1)
FILES = {"config.json": b'{"a": 1}', "vae/model.bin": b"v" * 1000, "model.safetensors": WEIGHTS}


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as served:
        yield served


def source_of(hub: Hub, **environ: str) -> HubSource:
    return HubSource({"HF_ENDPOINT": hub.url, **environ})


def read(source: Source, locator: str, start: int = 0) -> bytes:
    body, data, view = source.open(locator, start=start), bytearray(), memoryview(bytearray(1 << 16))
    try:
        while count := body.read_into(view):
            data += view[:count]
    finally:
        body.close()
    return bytes(data[start - body.start :])


def auths(hub: Hub) -> set[str | None]:
    """What the hub was given as credentials."""
    return {authorization(seen) for seen in hub.requests}


# ---- the contract


class HubContract(SourceContract):
    name, locator, branch = "org/name", "hf://org/name/m", "main"

    @pytest.fixture(autouse=True)
    def serve(self) -> Iterator[None]:
        with Hub() as self.hub:
            files = {f"m/{name}": data for name, data in self.OBJECTS.items()}
            repository = self.hub.add(self.name, {"README.md": b"another revision"})
            repository.commit({**files, "m-other/x": b"not below m", "y": b"nor this"}, self.branch)
            self.hub.page = 2
            yield

    def folder(self) -> str:
        return self.locator

    def make(self) -> Source:
        return source_of(self.hub)


class TestModel(HubContract):
    pass


class TestDatasetAtPullRequest(HubContract):
    name, locator, branch = "datasets/org/name", "hf://datasets/org/name@refs%2Fpr%2F1/m", "refs/pr/1"


class TestRepositoryOfOneSegment(HubContract):
    name, locator = "gpt2", "hf://gpt2@main/m"


# ---- locators


@pytest.mark.parametrize(
    ("locator", "parts", "canonical"),
    [
        ("hf://org/name", ("", "org/name", "main", ""), "hf://org/name@main"),
        ("hf://org/name/", ("", "org/name", "main", ""), "hf://org/name@main"),
        ("hf://org/name/a/b.bin", ("", "org/name", "main", "a/b.bin"), "hf://org/name@main/a/b.bin"),
        ("hf://org/name@v1.0/a", ("", "org/name", "v1.0", "a"), "hf://org/name@v1.0/a"),
        ("hf://org/name@refs%2Fpr%2F1/a", ("", "org/name", "refs/pr/1", "a"), "hf://org/name@refs%2Fpr%2F1/a"),
        ("hf://org/name@refs/pr/1/a", ("", "org/name", "refs/pr/1", "a"), "hf://org/name@refs%2Fpr%2F1/a"),
        ("hf://org/name@refs/convert/parquet", ("", "org/name", "refs/convert/parquet", ""), None),
        ("hf://org/name@refs/heads/x", ("", "org/name", "refs", "heads/x"), None),
        ("hf://models/org/name/a", ("models/", "org/name", "main", "a"), "hf://models/org/name@main/a"),
        ("hf://datasets/org/name@x", ("datasets/", "org/name", "x", ""), None),
        ("hf://spaces/org/name/app.py", ("spaces/", "org/name", "main", "app.py"), None),
        ("hf://gpt2", ("", "gpt2", "main", ""), "hf://gpt2@main"),
        ("hf://gpt2@main/onnx/x", ("", "gpt2", "main", "onnx/x"), None),
        ("hf://gpt2/onnx", ("", "gpt2/onnx", "main", ""), None),
        ("hf://datasets/squad@x/a@b", ("datasets/", "squad", "x", "a@b"), "hf://datasets/squad@x/a%40b"),
        ("hf://org/name/a%20%23%3F%25%40b", ("", "org/name", "main", "a #?%@b"), "hf://org/name@main/a%20%23%3F%25%40b"),
    ],
)
def test_a_locator_names_repository_revision_and_path(locator: str, parts: tuple[str, ...], canonical: str | None):
    """The part before @ is the repository; without it the repository is the first two segments."""
    path = HubPath.parse(locator)

    assert (path.kind, path.name, path.revision, path.path) == parts
    assert HubPath.parse(str(path)) == path
    assert canonical in (None, str(path))


@pytest.mark.parametrize(
    "locator",
    [
        *("hf://", "hf:///x", "hf://../x", "hf://org/..", "hf://or g/name", "hf://org/name/../x", "hf://org/name/a//b"),
        *("hf://org/name@main/%2e%2e/x", "hf://me:canary@org/name", "hf://-org/name", "hf://o%2Frg/name", "HF://org/name"),
    ],
)
def test_what_names_no_repository_is_refused_before_anything_is_asked(hub: Hub, locator: str):
    """The hint shows how a locator is written, and nothing secret of this one is repeated."""
    with pytest.raises(SourceError, match="not a locator") as caught:
        source_of(hub).open(locator)

    assert "hf://org/name" in caught.value.hint and "canary" not in str(caught.value)
    assert not hub.requests


def test_locators_of_files_are_quoted_and_name_the_repository_for_certain():
    """A file of a one-segment repository would be taken for a repository of an organisation otherwise."""
    assert join_locator("hf://org/name@v1/m/", "a #?%@b") == "hf://org/name@v1/m/a%20%23%3F%25%40b"
    assert join_locator("hf://org/name", "x") == "hf://org/name/x"
    assert join_locator("hf://gpt2", "onnx/x") == "hf://gpt2@main/onnx/x"
    assert join_locator("hf://datasets/squad/", "x") == "hf://datasets/squad@main/x"
    assert locator_prefixes("hf://org/name/folder") == ("hf://org/name@", "hf://org/name/")
    assert locator_prefixes("hf://datasets/org/name@v1") == ("hf://datasets/org/name@", "hf://datasets/org/name/")
    assert redact("hf://gpt2@main/x?q") == "hf://gpt2@main/x"


# ---- listings


def test_a_listing_is_pinned_and_names_lfs_files_by_their_sha256(hub: Hub):
    """Of other files git's digest says nothing about the content; folders are none; not a byte of weights is sent."""
    repository = hub.add("org/name", FILES)
    commit = repository.branches["main"]

    listing = source_of(hub).listing("hf://org/name")

    assert listing.locator == f"hf://org/name@{commit}"
    assert {f.path: (f.size, f.sha256) for f in listing.files} == {
        "config.json": (8, None),
        "vae/model.bin": (1000, hashlib.sha256(FILES["vae/model.bin"]).hexdigest()),
        "model.safetensors": (300_000, hashlib.sha256(WEIGHTS).hexdigest()),
    }
    assert source_of(hub).listing("hf://org/name/vae").locator == f"hf://org/name@{commit}/vae"
    assert not hub.cdn.requests and not [seen for seen in hub.requests if "resolve" in seen.path]


def test_a_long_listing_is_read_page_by_page(hub: Hub):
    """As far as the Link headers lead."""
    hub.add("org/name", {f"{number:04}.bin": b"%d" % number for number in range(25)})
    hub.page = 7

    assert len(source_of(hub).listing("hf://org/name").files) == 25
    assert len([seen for seen in hub.requests if "/tree/" in seen.path]) == 4


@pytest.mark.parametrize("link", ["http://127.0.0.1:1/more?secret=canary", "ftp://h.example/x", "http://h.example:99999/"])
def test_a_listing_that_continues_elsewhere_is_refused(hub: Hub, link: str):
    """Only the hub lists what is the hub's; the address is reported without its query."""
    hub.add("org/name", {"a": b"a", "b": b"b"})
    hub.page, hub.next_link = 1, link

    with pytest.raises(ProtocolError, match="another address") as caught:
        source_of(hub).listing("hf://org/name")

    assert "canary" not in str(caught.value)


def test_a_listing_without_end_is_given_up(hub: Hub, monkeypatch: pytest.MonkeyPatch):
    """Neither pages nor bytes are read without bound."""
    hub.add("org/name", {"a": b"a", "b": b"b"})
    hub.page, hub.next_link = 1, "?cursor=0"  # the first page forever
    monkeypatch.setattr(hub_source, "_PAGES", 5)
    with pytest.raises(NotListable, match="more than 5 pages"):
        source_of(hub).listing("hf://org/name")
    monkeypatch.setattr(hub_source, "_PAGES", 10_000)
    monkeypatch.setattr(hub_source, "_LISTING_BYTES", 1000)
    with pytest.raises(ProtocolError, match="too long"):
        source_of(hub).listing("hf://org/name")


GOOD = {"type": "file", "path": "m/a", "size": 1, "oid": "0" * 40}


@pytest.mark.parametrize(
    "rows",
    [
        *({}, None, ["x"], [[]]),
        *([{**GOOD, "path": path}] for path in (None, ["m"], "a", "/m/a", "m-other/a", "../m/a")),
        *([{**GOOD, "size": size}] for size in ("1", 1.5, True, None)),
        *([{**GOOD, "lfs": lfs}] for lfs in ("x", {}, {"oid": None, "size": 1}, {"oid": "0" * 64})),
    ],
)
def test_a_listing_that_makes_no_sense_is_refused(hub: Hub, rows: object):
    """By its form here; whether names, sizes and digests are good is for who locks them."""
    hub.add("org/name", {"m/a": b"a"})
    hub.edit = lambda _: rows

    with pytest.raises(ProtocolError):
        source_of(hub).listing("hf://org/name/m")


@pytest.mark.parametrize("answer", [b"", b"<html>", b"[]", b'{"sha": 1}', b'{"sha": "main"}', b"[" * 100_000])
def test_an_answer_that_names_no_commit_is_refused(hub: Hub, answer: bytes, monkeypatch: pytest.MonkeyPatch):
    """What is not pinned cannot be locked."""
    monkeypatch.setattr(hub, "answer", lambda seen: (200, {}, answer))

    with pytest.raises(ProtocolError):
        source_of(hub).listing("hf://org/name")


# ---- tokens


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, None),
        ({"HF_TOKEN": "one"}, "one"),
        ({"HF_TOKEN": "  one\n"}, "one"),
        ({"HUGGING_FACE_HUB_TOKEN": "old"}, "old"),
        ({"HF_TOKEN": "one", "HUGGING_FACE_HUB_TOKEN": "old", "HF_HOME": "{tmp}/home"}, "one"),
        ({"HF_TOKEN_PATH": "{tmp}/token"}, "of-the-path"),
        ({"HF_TOKEN_PATH": "~/token", "HOME": "{tmp}"}, "of-the-path"),
        ({"HF_TOKEN": " \n", "HF_HOME": "{tmp}/home"}, "of-home"),
        ({"HF_TOKEN_PATH": "{tmp}/token", "HF_HOME": "{tmp}/home"}, "of-the-path"),
        ({"XDG_CACHE_HOME": "{tmp}/cache"}, "of-the-cache"),
        ({"HOME": "{tmp}/user"}, "of-the-user"),
        ({"HF_HOME": "{tmp}/nowhere", "HOME": "{tmp}/user"}, None),
        ({"HF_TOKEN_PATH": "{tmp}/empty"}, None),
    ],
)
def test_the_token_is_found_where_the_hubs_own_client_finds_it(
    tmp_path: Path, environ: dict[str, str], expected: str | None
):
    """The environment first, then the file of `hf auth login`."""
    for place, text in {
        "token": "of-the-path\n",
        "empty": "\n",
        "home/token": "of-home",
        "cache/huggingface/token": "of-the-cache",
        "user/.cache/huggingface/token": "of-the-user",
    }.items():
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / place).write_text(text)

    assert find_token({key: value.replace("{tmp}", str(tmp_path)) for key, value in environ.items()}) == expected


def test_the_token_goes_to_the_hub_and_never_to_its_cdn(hub: Hub):
    """Neither with a listing's requests nor along a redirect."""
    hub.add("org/name", FILES, private=True)
    hub.tokens[TOKEN] = {"org/name"}
    source = source_of(hub, HF_TOKEN=TOKEN)

    source.listing("hf://org/name")
    assert read(source, "hf://org/name/model.safetensors", 100) == WEIGHTS[100:]
    assert source.size("hf://org/name/model.safetensors") == len(WEIGHTS)

    assert auths(hub) == {f"Bearer {TOKEN}"}
    assert hub.cdn.requests
    assert not [seen for seen in hub.cdn.requests if TOKEN in str(seen)]


# ---- refusals


@pytest.mark.parametrize(
    ("locator", "token", "kind", "what", "hint"),
    [
        (
            "hf://org/gated/model.safetensors",
            "",
            AccessDenied,
            "is gated",
            "request access at {url}/org/gated, then set HF_TOKEN",
        ),
        ("hf://org/gated/model.safetensors", TOKEN, AccessDenied, "is gated", "request access at {url}/org/gated"),
        ("hf://datasets/org/gated/a.bin", "", AccessDenied, "is gated", "{url}/datasets/org/gated,"),
        (
            "hf://org/private/config.json",
            "",
            AccessDenied,
            "private, or there is no such",
            "set HF_TOKEN or run `hf auth login`",
        ),
        ("hf://org/missing/config.json", "", AccessDenied, "private, or there is no such", "check the name"),
        ("hf://org/private/config.json", "hf_bad", AccessDenied, "the token may not read org/private", "valid"),
        ("hf://org/private/config.json", TOKEN, NotFound, "no org/private", "check the name"),
        ("hf://org/open@v9/config.json", "", NotFound, "no revision 'v9'", "{url}/org/open"),
        ("hf://org/open/nothing", "", NotFound, "no such file", ""),
    ],
)
def test_a_refusal_says_what_to_do(hub: Hub, locator: str, token: str, kind: type[SourceError], what: str, hint: str):
    """The hub distinguishes gated, private and missing by headers only."""
    hub.add("org/open", FILES)
    hub.add("org/gated", FILES, gated=True)
    hub.add("datasets/org/gated", {"a.bin": b"a"}, gated=True)
    hub.add("org/private", FILES, private=True)
    hub.tokens[TOKEN] = set()

    with pytest.raises(kind, match=what) as caught:
        source_of(hub, HF_TOKEN=token).open(locator)

    assert hint.replace("{url}", hub.url) in caught.value.hint
    assert caught.value.locator == locator
    assert caught.value.status in (401, 403, 404)
    assert "canary" not in str(caught.value) + caught.value.hint


def test_a_refusal_without_a_reason_is_reported_as_it_is(hub: Hub):
    """Not every 403 is about a gate: the repository may be disabled, or the CDN may refuse."""
    hub.add("org/name", FILES)
    hub.fail("*", Fault(status=403))
    with pytest.raises(AccessDenied, match=r"the hub refuses \(HTTP 403 Forbidden"):
        source_of(hub).listing("hf://org/name")
    hub.cdn.uses = 0
    with pytest.raises(AccessDenied, match=r"the hub refuses \(HTTP 403 Forbidden"):
        source_of(hub).open("hf://org/name/model.safetensors")


def test_a_listing_is_refused_in_the_same_words(hub: Hub):
    """Private, missing, no such revision, no such folder."""
    hub.add("org/open", FILES)

    for locator, kind in {
        "hf://org/missing": AccessDenied,
        "hf://org/open@v9": NotFound,
        "hf://org/open/nowhere": NotFound,
    }.items():
        with pytest.raises(kind) as caught:
            source_of(hub).listing(locator)
        assert caught.value.locator == locator


def test_a_hub_that_is_busy_may_be_asked_again(hub: Hub):
    """Its wish to be left alone survives the explanation."""
    hub.fail("*", Fault(status=429, headers={"Retry-After": "7"}))

    with pytest.raises(Throttled) as caught:
        source_of(hub).listing("hf://org/name")

    assert caught.value.retry_after == 7.0


def test_a_commit_that_vanished_is_sought_at_main(hub: Hub):
    """Whose bytes these are, the digest in the lockfile decides."""
    repository = hub.add("org/name", FILES)
    gone = "f" * 40

    assert read(source_of(hub), f"hf://org/name@{gone}/config.json") == FILES["config.json"]
    with pytest.raises(NotFound, match="no such file"):
        source_of(hub).open(f"hf://org/name@{gone}/nothing")
    # The commit is there and the file is not in it: main's is another one.
    old = repository.branches["main"]
    repository.commit({"new": b"new"})
    for locator in (f"hf://org/name@{old}/new", "hf://org/name@v9/new"):
        with pytest.raises(NotFound):
            source_of(hub).open(locator)
    with pytest.raises(NotFound):  # what is to be locked is not swapped
        source_of(hub).listing(f"hf://org/name@{gone}")


def test_a_renamed_repository_is_followed(hub: Hub):
    """The hub redirects to the new name, relative to itself; the token goes along."""
    hub.add("org/new", FILES, private=True)
    hub.moved["org/old"] = "org/new"
    hub.tokens[TOKEN] = {"org/new"}
    source = source_of(hub, HF_TOKEN=TOKEN)

    listing = source.listing("hf://org/old")

    assert len(listing.files) == 3
    assert read(source, join_locator(listing.locator, "model.safetensors")) == WEIGHTS


def test_a_hub_in_offline_mode_is_not_asked(hub: Hub):
    """HF_HUB_OFFLINE holds for who uses the source alone, too."""
    source = source_of(hub, HF_HUB_OFFLINE="1")

    for ask in (source.open, source.size, source.listing):
        with pytest.raises(Offline, match="HF_HUB_OFFLINE"):
            ask("hf://org/name/config.json")
    assert not hub.requests


@pytest.mark.parametrize(
    "address",
    [
        "hub.example.org",
        "ftp://hub.example.org",
        "https://",
        "https://h:99999",
        "https://me:canary@h",
        "https://h?x=canary",
    ],
)
def test_an_endpoint_that_is_none_is_refused(address: str):
    """By its name, without what is secret in it."""
    with pytest.raises(SourceError, match="HF_ENDPOINT") as caught:
        HubSource({"HF_ENDPOINT": address})

    assert "canary" not in str(caught.value)


def test_the_endpoint_is_what_fails_together(hub: Hub, monkeypatch: pytest.MonkeyPatch):
    """One hub, one origin; huggingface.co where none is named; hf:// is known to who opens any locator."""
    assert HubSource({}).origin("hf://org/name") == "https://huggingface.co"
    assert (
        HubSource({"HF_ENDPOINT": "https://hub.example.org/mirror/"}).origin("hf://a/b") == "https://hub.example.org/mirror"
    )
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    hub.add("org/name", FILES)

    assert open_source("hf://org/name").size("hf://org/name/config.json") == 8


# ---- whole transfers


def test_a_file_outlives_the_signatures_of_its_addresses(hub: Hub):
    """What was signed for one range is not needed for the next."""
    hub.add("org/name", FILES)
    source = source_of(hub)

    for start in (0, 100_000, 200_000):
        assert read(source, "hf://org/name/model.safetensors", start) == WEIGHTS[start:]
        hub.cdn.expire()


def test_a_signed_address_that_expires_in_mid_file_is_requested_again(hub: Hub, tmp_path: Path):
    """Each signature serves once and the connection breaks: what is there is kept, and the hub is asked again."""
    big = some_bytes(24 << 20, 5)
    commit = hub.add("org/name", {"model.safetensors": big}).branches["main"]
    hub.cdn.uses = 1
    [listed] = source_of(hub).listing("hf://org/name").files
    hub.cdn.fail(f"lfs/{listed.sha256}", Fault(cut_after=23 << 20, reset=False))
    lock = lock_of({"m@1": {"v": {"model.safetensors": big}}}, [f"hf://org/name@{commit}"])
    models = ensurer_of(tmp_path, lock, sources={"hf": source_of(hub, HF_TOKEN=TOKEN)}, retry=IMPATIENT)
    hub.tokens[TOKEN] = set()

    path = models.ensure("m@1", "v")

    assert tree_of(path) == {"model.safetensors": big}
    ranges = [seen.range for seen in hub.cdn.gets() if seen.sent]
    assert ranges == [f"bytes=0-{len(big) - 1}", f"bytes={23 << 20}-{len(big) - 1}"]
    assert len(hub.gets(address_of("org/name", "model.safetensors", commit))) >= 2
    assert not [seen for seen in hub.cdn.requests if authorization(seen)]


def manifest(cli: Cli, *sources: str, variant: str = "") -> None:
    (cli.folder / "models.toml").write_text(manifest_of(*sources, variant=variant))


def locked(cli: Cli) -> dict[str, list[str]]:
    """The locators of every blob by digest."""
    return {key: row["urls"] for key, row in json.loads((cli.folder / "models.lock").read_text())["blobs"].items()}


def test_a_model_is_locked_without_its_weights_and_then_fetched(cli: Cli, hub: Hub):
    """`lock` reads what the hub does not name by sha256, pins the commit, and `reconcile` fetches the rest."""
    repository = hub.add("org/name", {**FILES, "with #%.json": b"{}"})
    commit = repository.branches["main"]
    environ = {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN}
    hub.tokens[TOKEN] = set()
    manifest(cli, "hf://org/name")

    ran = cli.ok("lock", **environ)

    assert not hub.cdn.requests
    assert {seen.path.rpartition("/")[2] for seen in hub.requests if "/resolve/" in seen.path} == {
        "config.json",
        "with #%.json",
    }
    urls = {url for row in locked(cli).values() for url in row}
    assert urls == {f"hf://org/name@{commit}/{p}" for p in ("config.json", "model.safetensors", "vae/model.bin")} | {
        f"hf://org/name@{commit}/with%20%23%25.json"
    }
    done = cli.ok("reconcile", "--json", **environ)
    assert tree_of(cli.root / "models" / "m@1" / "v") == repository.commits[commit]
    kept = (cli.folder / "models.lock").read_text()
    for secret in (TOKEN, CANARY):
        assert secret not in ran.out + ran.err + done.out + done.err + kept


def test_a_pin_stays_until_an_upgrade_is_asked_for(cli: Cli, hub: Hub):
    """The branch moves on; the lockfile does not, and the hub is not even asked."""
    repository = hub.add("org/name", {f"sub/{path}": data for path, data in FILES.items()})
    manifest(cli, "hf://org/name/sub")
    cli.ok("lock", HF_ENDPOINT=hub.url)
    first = (cli.folder / "models.lock").read_text()
    commit = repository.commit({"sub/model.safetensors": b"new weights"})
    hub.forget()

    cli.ok("lock", HF_ENDPOINT=hub.url)

    assert (cli.folder / "models.lock").read_text() == first and not hub.requests
    cli.ok("lock", "--upgrade", HF_ENDPOINT=hub.url)
    assert list(locked(cli).values()) == [[f"hf://org/name@{commit}/sub/model.safetensors"]]


def test_a_hub_behind_a_folder_is_named_in_the_lockfile_without_being_asked(cli: Cli, hub: Hub):
    """One segment is the repository's name there, too, and what was locked before stays as it was."""
    (cli.folder / "src").mkdir()
    (cli.folder / "src" / "model.safetensors").write_bytes(WEIGHTS)
    hub.add("gpt2", FILES)
    manifest(cli, "src", "hf://gpt2")

    cli.ok("lock", HF_ENDPOINT=hub.url)
    cli.ok("lock", HF_ENDPOINT=hub.url)

    assert list(locked(cli).values()) == [["src/model.safetensors", "hf://gpt2@main/model.safetensors"]]
    assert not hub.requests
    (cli.folder / "src" / "model.safetensors").unlink()
    cli.ok("ensure", "m@1", "--force", HF_ENDPOINT=hub.url)
    assert hub.cdn.sent() == len(WEIGHTS)


def test_gated_weights_end_with_exit_code_8_and_say_where_to_ask(cli: Cli, hub: Hub):
    """A gated repository may be listed by all, so `lock` fails only where it has to read a file."""
    hub.add("org/name", FILES, gated=True)
    manifest(cli, "hf://org/name", variant='include = ["*.safetensors"]')
    cli.ok("lock", HF_ENDPOINT=hub.url)

    for command in ("reconcile", "lock"):
        ran = cli.run(command, HF_ENDPOINT=hub.url)
        assert ran.code == 8, ran.err
        assert "is gated" in ran.err
        assert f"hint: request access at {hub.url}/org/name, then set HF_TOKEN" in ran.err
        manifest(cli, "hf://org/name")

    hub.tokens[TOKEN] = {"org/name"}
    cli.ok("lock", HF_ENDPOINT=hub.url, HF_TOKEN=TOKEN)
    cli.ok("reconcile", HF_ENDPOINT=hub.url, HF_TOKEN=TOKEN)
    assert tree_of(cli.root / "models" / "m@1" / "v") == FILES


def test_a_private_model_ends_with_exit_code_8(cli: Cli, hub: Hub):
    """Without a token the hub does not even list it."""
    hub.add("org/name", FILES, private=True)
    manifest(cli, "hf://org/name")

    ran = cli.run("lock", HF_ENDPOINT=hub.url)

    assert ran.code == 8 and "hf auth login" in ran.err


def test_an_offline_hub_ends_with_exit_code_5(cli: Cli, hub: Hub):
    """HF_HUB_OFFLINE forbids it as --offline does."""
    hub.add("org/name", FILES)
    manifest(cli, "hf://org/name")
    offline = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "1"}

    assert cli.run("lock", **offline).code == 5
    assert not hub.requests
    cli.ok("lock", HF_ENDPOINT=hub.url)
    hub.forget()
    assert cli.run("reconcile", **offline).code == 5
    assert not hub.requests


def test_a_wrong_digest_of_the_hub_is_noticed(cli: Cli, hub: Hub):
    """The lockfile's sha256 is the hub's claim at locking; wrong bytes end with exit code 5."""
    hub.add("org/name", FILES)
    manifest(cli, "hf://org/name", variant='include = ["*.safetensors"]')
    cli.ok("lock", HF_ENDPOINT=hub.url)
    hub.cdn.fail(f"lfs/{hashlib.sha256(WEIGHTS).hexdigest()}", Fault(flip=5, times=-1))

    ran = cli.run("reconcile", HF_ENDPOINT=hub.url)

    assert ran.code == 5 and "corrupt data" in ran.err


# ---- the hub of these tests

CLIENT = """
import json, sys
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError, GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
)

def tree(**where):
    rows = HfApi().list_repo_tree("org/name", recursive=True, **where)
    return {row.path: row.lfs.sha256 if row.lfs else None for row in rows if hasattr(row, "size")}

def refused(kind, name, **more):
    try:
        HfApi().hf_hub_download(name, "config.json", **more)
    except kind:
        return True

print(json.dumps({
    "tree": tree(), "folder": tree(path_in_repo="vae"), "dataset": tree(repo_type="dataset", revision="refs/pr/1"),
    "sha": HfApi().model_info("org/name").sha,
    "path": snapshot_download("org/name", token="hf_canary"), "old": snapshot_download("org/old"),
    "refused": [
        refused(GatedRepoError, "org/gated"),
        refused(HfHubHTTPError, "org/private"),  # over https it would be called RepositoryNotFoundError
        refused(RepositoryNotFoundError, "org/missing", token="hf_canary"),
        refused(RevisionNotFoundError, "org/name", revision="v9"),
        refused(EntryNotFoundError, "org/name", subfolder="nowhere"),
    ],
}))
"""


def test_the_hub_of_these_tests_is_one_for_huggingface_hub(cli: Cli, hub: Hub):
    """The hub's own client lists, downloads and is refused here as our source is."""
    repository = hub.add("org/name", FILES)
    hub.add("datasets/org/name", {}).commit({"a.bin": b"a"}, "refs/pr/1")
    hub.add("org/gated", FILES, gated=True)
    hub.add("org/private", FILES, private=True)
    hub.moved["org/old"] = "org/name"
    hub.tokens[TOKEN] = set()
    hub.page = 2
    quiet = {f"HF_HUB_DISABLE_{what}": "1" for what in ("XET", "TELEMETRY", "PROGRESS_BARS", "UPDATE_CHECK")}
    environ = cli.environ(HF_ENDPOINT=hub.url, HF_HOME=str(cli.folder / "hf"), **quiet)

    done = subprocess.run([sys.executable, "-c", CLIENT], env=environ, capture_output=True, text=True, timeout=120)

    assert done.returncode == 0, done.stderr
    reported = json.loads(done.stdout)
    ours = source_of(hub).listing("hf://org/name")
    assert reported["tree"] == {listed.path: listed.sha256 for listed in ours.files}
    assert reported["folder"] == {"vae/model.bin": hashlib.sha256(FILES["vae/model.bin"]).hexdigest()}
    assert reported["dataset"] == {"a.bin": hashlib.sha256(b"a").hexdigest()}
    assert reported["sha"] == repository.branches["main"] == ours.locator.partition("@")[2]
    assert tree_of(Path(reported["path"])) == tree_of(Path(reported["old"])) == FILES
    assert reported["refused"] == [True] * 5
    assert not [seen for seen in hub.cdn.requests if authorization(seen)]
