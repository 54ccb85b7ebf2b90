"""Mirrors: over HTTP, in buckets and folders, plain and as compressed pieces; asked first, trusted never."""

from __future__ import annotations

import json
import os
import shutil
import socket
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import boto3
import pytest
from builders import PATIENCE_S, PIECE, Cli, assert_sound, ensurer_of, leftovers, lock_of, some_bytes, tree_of, wait_until
from mirror import CONFIG, FILES, NOISE, filled, name_of, packed, weights
from origin import Fault, Origin, RawServer, gate_of
from s3servers import settings

from modelstow import ModelEnsurer
from modelstow.backends import Body, TimedOut
from modelstow.backends.memory import MemorySource
from modelstow.cas import BlobStore, Cancelled, ChecksumError, Digest
from modelstow.cas.compressed import index_bytes
from modelstow.cas.scrub import Level
from modelstow.reconcile.errors import SourceUnavailableError
from modelstow.reconcile.events.events import BlobFetched, Event, FetchStarted, SourceFailed, Warning
from modelstow.reconcile.transfer.compressed import CompressedBlob
from modelstow.reconcile.transfer.retry import RetryPolicy, RetrySchedule

pytestmark = pytest.mark.slow

LARGE = weights(3 * PIECE + 1001, seed=3)
PACK = name_of(LARGE, ".pzst")
SAME_LENGTH = weights(len(LARGE), seed=8)


class World:
    """A store, a mirror over HTTP and a source; and the events that were reported."""

    def __init__(self, folder: Path, mirror: Mapping[str, bytes], source: Mapping[str, bytes] | None = None) -> None:
        self.folder, self.events = folder, list[Event]()
        self.mirror, self.source = Origin(mirror), Origin(source or {})

    def __enter__(self) -> World:
        self.mirror.__enter__()
        self.source.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.mirror.stop()
        self.source.stop()

    def ensurer(self, files: Mapping[str, bytes], *, mirrors: tuple[str, ...] = (), **more: object) -> ModelEnsurer:
        lock = lock_of({"m@1": {"v": files}}, sources=[self.source.url])
        models = ensurer_of(self.folder, lock, events=self.events.append, **more)
        models.settings = replace(models.settings, mirrors=mirrors or (self.mirror.url,))
        return models

    @property
    def failed(self) -> list[str]:
        """The locators whose failure was reported."""
        return [event.locator for event in self.events if isinstance(event, SourceFailed)]

    @property
    def fetched(self) -> BlobFetched:
        return next(event for event in self.events if isinstance(event, BlobFetched))

    def corrupt_sources(self) -> set[str]:
        """Locators on record on disk as having sent corrupt data for the large blob."""
        path = self.folder / "root/state/bad-sources" / Digest.of(LARGE).hex
        return set(json.loads(path.read_bytes().partition(b"\n")[0])["sources"]) if path.exists() else set()


def flipped(data: bytes, at: int) -> bytes:
    """The same with one bit turned."""
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


# ---- what was pushed is what is read


@pytest.mark.parametrize("compress", [False, True], ids=["plain", "packed"])
@pytest.mark.parametrize("kind", ["folder", "http", "s3"])
def test_what_was_pushed_is_all_that_another_machine_needs(
    cli: Cli, request: pytest.FixtureRequest, kind: str, compress: bool
):
    """The sources of the lockfile are gone; the mirror alone serves, and everything is proven."""
    filled(cli)
    environ, target = {}, "mirror"
    if kind == "s3":
        endpoint = request.getfixturevalue("moto")
        environ, target = settings(endpoint), f"s3://read-back/{compress}"
        boto3.client(
            "s3", endpoint_url=endpoint, region_name="us-east-1", aws_access_key_id="x", aws_secret_access_key="x"
        ).create_bucket(Bucket="read-back")
    cli.ok("push", "m", target, *["--compress"] * compress, **environ)
    shutil.rmtree(cli.root)

    with Origin.of_folder(cli.folder / "mirror", "deep/blobs/") as origin:
        mirror = f"{origin.url}/deep/blobs" if kind == "http" else target
        ran = cli.ok("reconcile", "--json", "--verbose", MODELSTOW_MIRRORS=mirror, **environ)

    assert tree_of(cli.root / "models/m@1/v") == FILES
    assert ran.json["summary"]["fetched_bytes"] == sum(map(len, FILES.values()))
    assert "source failed" not in ran.err  # what a mirror holds in the other way is no failure
    assert leftovers(cli.root) == []
    assert_sound(cli.root)


def test_repair_fetches_the_damaged_piece_alone_from_a_compressed_mirror(tmp_path: Path):
    """One frame of it."""
    with World(tmp_path, {PACK: packed(LARGE)[1]}) as world:
        models = world.ensurer({"model.bin": LARGE})
        models.ensure("m")
        blob = tmp_path / "root/blobs" / name_of(LARGE)
        blob.chmod(0o644)
        blob.write_bytes(flipped(LARGE, PIECE + 5))
        world.mirror.forget()

        models.ensure("m")

        first, last = packed(LARGE)[0].frame(1)
        assert world.mirror.sent(PACK) == last - first + index_bytes(len(LARGE))
    assert_sound(tmp_path / "root")


def test_a_compressed_mirror_is_read_over_several_connections(tmp_path: Path):
    """Over a slow mirror each connection fetches frames of its own, and together they fetch each frame once."""
    data = weights(6 * PIECE)
    with World(tmp_path, {name_of(data, ".pzst"): packed(data)[1]}) as world:
        world.mirror.rate = 4 << 20
        models = world.ensurer({"model.bin": data})
        models.settings = replace(models.settings, connections=4)

        path = models.ensure("m")

        assert (path / "model.bin").read_bytes() == data
        asked = world.mirror.gets(name_of(data, ".pzst"))
        assert len({seen.client for seen in asked}) > 1
        assert world.fetched.fetched_bytes <= len(data) + 2 * PIECE
    assert world.failed in ([], [f"{world.source.url}/model.bin"])  # the mirror has nothing to be reported of


def test_progress_is_reported_while_a_frame_arrives(tmp_path: Path):
    """In plain bytes: a slow mirror is not taken for a silent one for the time of eight megabytes."""
    reported: list[int] = []
    with World(tmp_path, {PACK: packed(LARGE)[1]}) as world:
        gate = gate_of(world.mirror, PACK, after=packed(LARGE)[0].frame(0)[1] - 1000)

        def progress(done: int, total: int) -> None:
            reported.append(done)
            if done > 2 << 20:
                gate.set()

        world.ensurer({"model.bin": LARGE}).ensure("m", progress_callback=progress)

    assert reported == sorted(reported) and reported[-1] == len(LARGE) and any(0 < done < PIECE for done in reported)


def test_a_killed_fetch_from_a_compressed_mirror_is_resumed(cli: Cli):
    """kill -9 in the second frame: the first is not asked for again."""
    files = {"model.bin": LARGE}
    filled(cli, files)
    cli.ok("push", "m", "mirror", "--compress")
    shutil.rmtree(cli.root)
    index = packed(LARGE)[0]
    with Origin.of_folder(cli.folder / "mirror") as origin:
        gate = gate_of(origin, PACK, after=index.frame(1)[0] + 1000)
        with cli.start("ensure", "m", "--connections", "1", MODELSTOW_MIRRORS=origin.url) as process:
            assert origin.reached.wait(PATIENCE_S)
            journal = cli.root / "partial" / f"{Digest.of(LARGE).hex}.pieces"
            wait_until(lambda: journal.stat().st_size >= 168 and journal.read_bytes()[136:168] != bytes(32))
            process.kill()
        gate.set()
        origin.forget()

        ran = cli.ok("ensure", "m", "--json", "--connections", "1", MODELSTOW_MIRRORS=origin.url)

        assert ran.json["summary"]["resumed_bytes"] == PIECE
        assert ran.json["summary"]["fetched_bytes"] == len(LARGE) - PIECE
        assert origin.sent(PACK) == index_bytes(len(LARGE)) + index.total - index.frame(1)[0]
    assert tree_of(cli.root / "models/m@1/v") == files


def test_a_server_that_ignores_ranges_serves_compressed_pieces_too(tmp_path: Path):
    """Python's own http.server is one: everything comes, and everything is used."""
    with World(tmp_path, {PACK: packed(LARGE)[1]}) as world:
        world.mirror.fail("*", Fault(ignore_range=True, times=-1))
        models = world.ensurer({"model.bin": LARGE})
        models.settings = replace(models.settings, connections=1)  # another would try the source, which has nothing

        path = models.ensure("m")

        assert (path / "model.bin").read_bytes() == LARGE
    assert world.failed == [] and world.fetched.fetched_bytes == len(LARGE)


# ---- mirrors that are wrong

RIGHT = packed(LARGE)[1]
FIRST, SECOND = packed(LARGE)[0].frame(1)
WRONG = {
    "a damaged frame": flipped(RIGHT, (FIRST + SECOND) // 2),
    "a damaged index": flipped(RIGHT, 60),
    "another blob's index": packed(SAME_LENGTH)[1],
    "another blob's content": packed(SAME_LENGTH, as_if=LARGE)[1],
    "something else": b"<html>welcome</html>" * 100_000,
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_pack_costs_a_request_and_is_named_and_remembered(tmp_path: Path, what: str):
    """The source takes over; the pack alone is to blame, not its host; the next process asks it last."""
    files = {"model.bin": LARGE, "config.json": CONFIG}
    with World(tmp_path, {PACK: WRONG[what], name_of(CONFIG): CONFIG}, files) as world:
        locator = f"{world.mirror.url}/{PACK}"
        models = world.ensurer(files)

        path = models.ensure("m")

        assert tree_of(path) == files
        assert set(world.failed) == {locator} == world.corrupt_sources() == set(models.failed_sources)
        assert models.failed_sources[locator].code == "CHECKSUM_FAIL"
        shutil.rmtree(tmp_path / "root/blobs")
        shutil.rmtree(tmp_path / "root/models")
        world.mirror.forget()

        world.ensurer(files).ensure("m")

        assert world.mirror.gets(PACK) == [] and world.mirror.gets(name_of(CONFIG))
    assert_sound(tmp_path / "root")


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_pack_without_another_source_is_an_error_that_names_it(tmp_path: Path, what: str):
    """It is requested once more, since a bit may flip on the way."""
    with World(tmp_path, {PACK: WRONG[what]}) as world:
        with pytest.raises(ChecksumError) as caught:
            world.ensurer({"model.bin": LARGE}).ensure("m")

        assert f"{world.mirror.url}/{PACK}: sent corrupt data" in str(caught.value)
        assert len(world.mirror.gets(PACK)) > 1
    assert not list((tmp_path / "root/blobs").rglob(Digest.of(LARGE).hex))


def test_a_bit_that_turns_on_the_way_costs_the_frame_alone(tmp_path: Path):
    """The same mirror sends the right frame at the second request, and is then not on record as corrupt."""
    with World(tmp_path, {PACK: RIGHT}) as world:
        world.mirror.fail(PACK, Fault())  # the index is right
        world.mirror.fail(PACK, Fault(flip=SECOND - 9))
        models = world.ensurer({"model.bin": LARGE})

        assert (models.ensure("m") / "model.bin").read_bytes() == LARGE

    assert world.corrupt_sources() == set() and not [
        key for key in models.failed_sources if key.startswith(world.mirror.url)
    ]


def test_a_pack_that_ends_early_is_named(tmp_path: Path):
    """The connection breaks again and again in the same place; that the plain blob is not there explains nothing."""
    with World(tmp_path, {PACK: RIGHT}) as world:
        world.mirror.fail(PACK, Fault())
        world.mirror.fail(PACK, Fault(cut_after=1000, times=-1))

        with pytest.raises(SourceUnavailableError) as caught:
            world.ensurer({"model.bin": LARGE}).ensure("m")

        assert f"from {world.mirror.url}/{PACK}: " in str(caught.value)


def test_a_pack_of_another_length_than_its_index_says_is_left(tmp_path: Path):
    """It was replaced, or cut: the host is not to blame for it."""
    with World(tmp_path, {PACK: RIGHT[:-1]}, {"model.bin": LARGE}) as world:
        models = world.ensurer({"model.bin": LARGE})

        models.ensure("m")

        assert set(models.failed_sources) == {f"{world.mirror.url}/{PACK}"}


def test_a_mirror_that_trickles_within_a_frame_is_left():
    """Byte by byte: no time-out of a socket would ever come, and nothing is unpacked before the frame is whole."""
    now, index = 0.0, packed(LARGE)[0].encode()

    class Trickling(MemorySource):
        def open(self, locator: str, *, start: int = 0, stop: int | None = None) -> Body:
            if start == 0:
                return super().open(locator, start=start, stop=stop)

            def read_into(view: memoryview) -> int:
                nonlocal now
                now += 0.01
                return 1

            return Body(start=start, total=len(RIGHT), read_into=read_into)

    heard: list[int] = []
    pack = CompressedBlob("mem://x/pack", Digest.of(LARGE), len(LARGE), RetryPolicy(), lambda: now)
    body = pack.open(Trickling({"mem://x/pack": index}), 0, PIECE, heard.append)

    with pytest.raises(TimedOut, match="less than 1024 bytes a second for 60 s"):
        body.read_into(memoryview(bytearray(PIECE)))
    assert 60 <= now < 61 and sum(heard) > 0


# ---- mirrors that are silent, or not there


@pytest.mark.parametrize("refusal", [404, 403])
def test_a_mirror_that_holds_the_plain_blob_makes_no_noise(tmp_path: Path, refusal: int):
    """There is no pack; some buckets say 403 of what is not there."""
    with World(tmp_path, {name_of(LARGE): LARGE}) as world:
        world.mirror.fail(PACK, Fault(status=refusal, times=-1))
        models = world.ensurer({"model.bin": LARGE})
        models.settings = replace(models.settings, connections=1)  # another would try the source, which has nothing

        models.ensure("m")

        assert world.failed == [] and dict(models.failed_sources) == {}
        assert world.mirror.sent(name_of(LARGE)) == len(LARGE)


def test_a_mirror_without_the_blob_is_reported_once(cli: Cli):
    """It is reported by the plain name only."""
    filled(cli, {"noise.bin": NOISE})
    shutil.rmtree(cli.root)
    with Origin({}) as origin, Origin({"noise.bin": NOISE}) as source:
        (cli.folder / "models.lock").write_text(
            lock_of({"m@1": {"v": {"noise.bin": NOISE}}}, sources=[source.url]).format()
        )

        ran = cli.ok("ensure", "m", "--verbose", MODELSTOW_MIRRORS=origin.url)

        assert ran.err.count("source failed") == 1 and ".pzst" not in ran.err


def test_a_mirror_that_is_down_costs_little(tmp_path: Path):
    """The source serves while the mirror is backed off, even if that takes an hour; no blob waits for the pause."""
    files = {f"{n}.bin": some_bytes(2 << 20, n) for n in range(6)}
    with World(tmp_path, {}, files) as world, socket.create_server(("127.0.0.1", 0)) as taken:
        down = f"http://127.0.0.1:{taken.getsockname()[1]}"
        taken.close()
        hourly = RetrySchedule(attempts=5, pause_s=3600.0, longest_s=3600.0)
        models = world.ensurer(files, mirrors=(down,), retry=RetryPolicy(transient=hourly))

        path = models.ensure("m")

        assert tree_of(path) == files
        assert set(models.failed_sources) == {down}


@pytest.mark.usefixtures("endless_reads")
def test_stopping_ends_a_fetch_from_a_mirror_that_hangs_in_its_index(tmp_path: Path):
    """The flag is checked with every byte that arrives."""

    def trickle(connection: socket.socket) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100000000\r\n\r\n")
        for event in (stopping, server.stopped):
            connection.sendall(b"x")
            event.wait()

    stopping = threading.Event()

    with RawServer(trickle) as server, World(tmp_path, {}) as world:
        models = world.ensurer({"model.bin": LARGE}, mirrors=(server.url,))
        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(models.ensure, "m")
            assert server.connected.wait(PATIENCE_S)
            models.token.cancel()
            stopping.set()
            with pytest.raises(Cancelled):
                running.result(PATIENCE_S)


# ---- mirrors that are asked for each blob


class Peers:
    """Knows where each blob is, by digest, and notes for which it was asked."""

    def __init__(self, known: Mapping[Digest, str]) -> None:
        self.known, self.asked = dict(known), list[Digest]()

    def locators(self, digest: Digest, size: int) -> Iterator[str]:
        self.asked.append(digest)
        if digest in self.known:
            yield self.known[digest]


BLOB_A, BLOB_B, BLOB_C = (some_bytes((3 - number) << 20, number) for number in range(3))
THREE = {"first.bin": BLOB_A, "second.bin": BLOB_B, "third.bin": BLOB_C}


def test_a_provider_answers_for_each_blob_when_its_fetch_begins(tmp_path: Path):
    """What it learns during the run counts for the blobs after that; a blob that it does not know comes from elsewhere."""
    with World(tmp_path, {"peer/a": BLOB_A, "peer/b": BLOB_B}, THREE) as world:
        peers = Peers({Digest.of(BLOB_A): f"{world.mirror.url}/peer/a"})
        models = world.ensurer(THREE)
        models.settings = replace(models.settings, connections=1, mirrors=())
        models.mirrors = (peers,)

        def learn(event: Event) -> None:
            if isinstance(event, FetchStarted) and event.digest == Digest.of(BLOB_A):
                peers.known[Digest.of(BLOB_B)] = f"{world.mirror.url}/peer/b"

        with models.events.subscribe(learn):
            path = models.ensure("m")
        models.ensure("m")

        assert tree_of(path) == THREE and world.failed == []
        assert [world.mirror.sent(name) for name in ("peer/a", "peer/b")] == [len(BLOB_A), len(BLOB_B)]
        assert [world.source.sent(name) for name in THREE] == [0, 0, len(BLOB_C)]
        assert peers.asked == [Digest.of(BLOB_A), Digest.of(BLOB_B), Digest.of(BLOB_C)], "once, and not for what is there"


def test_a_provider_that_raises_is_warned_of_once_and_the_rest_serves(tmp_path: Path):
    """The mirrors of the settings and the blob's own sources are not affected."""

    class Broken:
        def locators(self, digest: Digest, size: int) -> tuple[str, ...]:
            raise ConnectionError("no route to the registry")

    with World(tmp_path, {name_of(BLOB_A): BLOB_A}, THREE) as world:
        models = world.ensurer(THREE)
        models.mirrors = (Broken(),)

        path = models.ensure("m")

        assert tree_of(path) == THREE
        assert world.mirror.sent(name_of(BLOB_A)) == len(BLOB_A)
    warnings = [event.text for event in world.events if isinstance(event, Warning)]
    assert warnings == ["mirrors could not be asked and are not used (ConnectionError)"]


def test_a_repair_asks_the_provider_too(tmp_path: Path):
    """The piece that is damaged comes from the peer; the sources of the lockfile have nothing."""
    with World(tmp_path, {"peer": LARGE}, {"model.bin": LARGE}) as world:
        models = world.ensurer({"model.bin": LARGE})
        models.ensure("m")
        blob = BlobStore.open(tmp_path / "root").layout.blob(Digest.of(LARGE))
        before = os.stat(blob)
        os.chmod(blob, 0o644)
        Path(blob).write_bytes(flipped(LARGE, PIECE + 5))
        os.utime(blob, ns=(before.st_atime_ns, before.st_mtime_ns))
        world.source.objects.clear()
        models.mirrors = (Peers({Digest.of(LARGE): f"{world.mirror.url}/peer"}),)

        found, outcome = models.verify(None, Level.FAST, repair=True)

        assert found.faults and outcome is not None and outcome.error is None
        assert world.mirror.sent("peer") == PIECE
        assert models.verify_integrity("m").success


# ---- what a plan says


def test_a_plan_names_the_mirror_that_is_asked_first(cli: Cli):
    """Those of the environment before those of the manifest, and both before the sources."""
    filled(cli, sources=["gone"])
    shutil.rmtree(cli.root)
    (cli.folder / "models.toml").write_text('schema = 1\n[mirrors]\nurls = ["s3://bucket/blobs/"]\n')

    def urls(**environ: str) -> set[str]:
        actions = cli.ok("plan", "--json", **environ).json["actions"]
        return {action["url"] for action in actions if action["do"] == "fetch"}

    names = {name_of(data) for data in FILES.values()}
    assert urls() == {f"s3://bucket/blobs/{name}" for name in names}
    assert urls(MODELSTOW_MIRRORS="https://mirror.example/ other") == {f"https://mirror.example/{name}" for name in names}
    assert "from s3://bucket/blobs/sha256/" in cli.ok("plan").out
    (cli.folder / "models.toml").unlink()
    assert urls() == {f"gone/{path}" for path in FILES}
