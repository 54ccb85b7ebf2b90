"""Pushing: what a mirror holds then, what is not sent again, and what is never published."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Lock
from typing import Any

import boto3
import pytest
from builders import PATIENCE_S, PIECE, Cli, ensurer_of, lock_of, memory, some_bytes, wait_until
from mirror import CONFIG, FILES, NOISE, WEIGHTS, filled, name_of, names_in, packed, push_of, store_of, weights
from origin import Origin
from s3servers import SECRET, rclone, settings, use

from modelstow import ModelEnsurer
from modelstow.backends import AccessDenied, ConnectionFailed, Registry, SourceError, TargetFull
from modelstow.backends.file import FileSource
from modelstow.backends.source import OnSend, ReadRange
from modelstow.cas import BlobStore, CancellationToken, Cancelled, Digest
from modelstow.cas.pieces import TableState, read_table
from modelstow.reconcile.errors import IntegrityError, ModelNotFoundError
from modelstow.reconcile.interop.push import Pushed, _Blob, _Damaged
from modelstow.reconcile.runtime import throttle
from modelstow.reconcile.settings import Settings

pytestmark = pytest.mark.slow

TABLES = {name_of(data, ".pieces") for data in (WEIGHTS, NOISE)}
PLAIN = TABLES | {name_of(data) for data in FILES.values()}
COMPRESSED_SUFFIX = PLAIN - {name_of(WEIGHTS)} | {name_of(WEIGHTS, ".pzst")}
TABLE_BYTES = 136 + 3 * 32, 136 + 2 * 32  # of the weights, of the noise


class Broken(Exception):
    """The test's own interruption."""


def breaking(after: int) -> Callable[[int], None]:
    """Raises when more than *at* bytes are about to be sent."""
    reported, mutex = 0, Lock()

    def pay(count: int) -> None:
        nonlocal reported
        with mutex:
            reported += count
            if reported > after:
                raise Broken

    return pay


def rot(root: Path, data: bytes, at: int = 0) -> Path:
    """Flip a bit of a blob behind stat's back."""
    blob = root / "blobs" / name_of(data)
    found = blob.stat()
    blob.chmod(0o644)
    with blob.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))
    blob.chmod(0o444)
    os.utime(blob, ns=(found.st_atime_ns, found.st_mtime_ns))
    return blob


# ---- what a mirror holds


def test_a_pushed_folder_is_laid_out_like_blobs(cli: Cli):
    """With the piece tables, proven ones; and nothing else is left there."""
    filled(cli)

    done = cli.ok("push", "m", "mirror", "--json").json

    assert names_in(cli.folder / "mirror") == PLAIN
    for data in FILES.values():
        assert (cli.folder / "mirror" / name_of(data)).read_bytes() == data
    table = read_table(str(cli.folder / "mirror" / name_of(WEIGHTS, ".pieces")), Digest.of(WEIGHTS))
    assert table is not None and table.complete and table.state is TableState.PROVEN
    size = sum(map(len, FILES.values()))
    assert done == {
        "schema": 1,
        "ok": True,
        "changed": True,
        "sent": sorted(Digest.of(data) for data in FILES.values()),
        "present": 0,
        "compressed": 0,
        "bytes": size,
        "sent_bytes": size + sum(TABLE_BYTES),
    }


def test_only_what_shrinks_by_a_tenth_is_sent_as_compressed_pieces(cli: Cli):
    """Noise is sent as it is, and so is what has no pieces."""
    filled(cli)

    done = cli.ok("push", "m", "mirror", "--compress", "--json").json

    mirror = cli.folder / "mirror"
    assert names_in(mirror) == COMPRESSED_SUFFIX and done["compressed"] == 1
    pack = mirror / name_of(WEIGHTS, ".pzst")
    assert pack.read_bytes() == packed(WEIGHTS)[1] and pack.stat().st_size < 0.9 * len(WEIGHTS)
    assert done["sent_bytes"] == pack.stat().st_size + len(NOISE) + len(CONFIG) + sum(TABLE_BYTES)
    assert done["bytes"] == sum(map(len, FILES.values()))


def test_samples_that_deceive_do_not_publish_a_large_pack(tmp_path: Path):
    """The pieces that were tried became small; all of them did not."""
    third = weights(PIECE // 3)  # of a piece: it becomes small enough, and every other one does not at all
    data = b"".join(some_bytes(PIECE, n) if n % 2 else third + some_bytes(PIECE - len(third), n) for n in range(8))
    store, sizes = store_of(tmp_path, {"model.bin": data})

    done = push_of(store, tmp_path / "mirror", compress=True).run(sizes)

    assert (done.compressed, len(done.sent)) == (0, 1)
    assert names_in(tmp_path / "mirror") == {name_of(data), name_of(data, ".pieces")}
    assert not list(store.layout.partials.iterdir())


def test_what_is_there_is_not_sent_again(cli: Cli):
    """Plain or compressed; a push that asks for plain sends plain, since not every reader knows the other."""
    filled(cli)
    cli.ok("push", "m", "mirror", "--compress")
    inodes = {path: path.stat().st_ino for path in (cli.folder / "mirror").rglob("*")}

    again = cli.ok("push", "m", "mirror", "--compress", "--json").json
    plain = cli.ok("push", "m", "mirror", "--json").json
    last = cli.ok("push", "m", "mirror", "--compress")

    assert (again["changed"], again["sent"], again["present"], again["sent_bytes"]) == (False, [], 3, 0)
    assert {path: path.stat().st_ino for path in inodes} == inodes
    assert plain["sent"] == [Digest.of(WEIGHTS)]
    assert names_in(cli.folder / "mirror") == COMPRESSED_SUFFIX | {name_of(WEIGHTS)}
    assert last.out == "sent 0 blobs of 0 B as 0 B, 0 compressed; 3 blobs already present\n"


def test_a_file_of_another_length_at_a_blobs_place_is_replaced(tmp_path: Path):
    """A partial copy is not taken for the blob."""
    store, sizes = store_of(tmp_path)
    place = tmp_path / "mirror" / name_of(WEIGHTS)
    place.parent.mkdir(parents=True)
    place.write_bytes(WEIGHTS[:1000])

    push_of(store, tmp_path / "mirror").run(sizes)

    assert place.read_bytes() == WEIGHTS


def test_a_dry_run_sends_nothing_and_says_what_would_be_sent(cli: Cli):
    """Not even a folder is made."""
    filled(cli)

    done = cli.ok("push", "m", "mirror", "--dry-run", "--json").json
    reported = cli.ok("push", "m", "mirror", "--dry-run")

    assert not (cli.folder / "mirror").exists()
    assert (done["changed"], len(done["sent"]), done["sent_bytes"]) == (False, 3, 0)
    assert done["bytes"] == sum(map(len, FILES.values()))
    assert reported.out.startswith("would send 3 blobs of ")


# ---- interrupted


def test_an_interrupted_push_into_a_folder_is_resumed(tmp_path: Path):
    """What was written is read back and not written again; only what is sent is paid for."""
    store, sizes = store_of(tmp_path, {"model.bin": WEIGHTS})
    mirror, paid = tmp_path / "mirror", list[int]()

    with pytest.raises(Broken):
        push_of(store, mirror, pay=breaking(TABLE_BYTES[0] + PIECE)).run(sizes)
    unfinished = names_in(mirror)
    done = push_of(store, mirror, pay=paid.append).run(sizes)

    assert unfinished == {name_of(WEIGHTS, ".pieces"), name_of(WEIGHTS, ".unfinished")}
    assert names_in(mirror) == {name_of(WEIGHTS, ".pieces"), name_of(WEIGHTS)}
    assert done.sent_bytes == len(WEIGHTS) - PIECE == sum(paid)
    assert (mirror / name_of(WEIGHTS)).read_bytes() == WEIGHTS


def test_a_push_of_compressed_pieces_is_resumed_too(tmp_path: Path):
    """The same pieces become the same frames."""
    data = weights(3 * PIECE)
    store, sizes = store_of(tmp_path, {"model.bin": data})
    mirror, whole = tmp_path / "mirror", packed(data)[0].total
    assert whole > 2 * PIECE

    with pytest.raises(Broken):
        push_of(store, mirror, compress=True, pay=breaking(TABLE_BYTES[0] + PIECE)).run(sizes)
    done = push_of(store, mirror, compress=True).run(sizes)

    assert done.sent_bytes == whole - PIECE
    assert names_in(mirror) == {name_of(data, ".pieces"), name_of(data, ".pzst")}
    assert (mirror / name_of(data, ".pzst")).read_bytes() == packed(data)[1]


def test_garbage_in_an_unfinished_file_is_written_over(tmp_path: Path):
    """It may be a crash's: as long as it likes, with zeros where bytes were lost."""
    store, sizes = store_of(tmp_path, {"model.bin": WEIGHTS})
    partial = tmp_path / "mirror" / name_of(WEIGHTS, ".unfinished")
    partial.parent.mkdir(parents=True)
    partial.write_bytes(WEIGHTS[:PIECE] + bytes(3 * PIECE))

    done = push_of(store, tmp_path / "mirror").run(sizes)

    assert (tmp_path / "mirror" / name_of(WEIGHTS)).read_bytes() == WEIGHTS
    assert done.sent_bytes == len(WEIGHTS) - PIECE + TABLE_BYTES[0]


def test_a_killed_push_is_resumed(cli: Cli):
    """kill -9 while the second piece is waited with."""
    filled(cli, {"model.bin": WEIGHTS})
    partial = cli.folder / "mirror" / name_of(WEIGHTS, ".unfinished")
    with cli.start("push", "m", "mirror", "--limit-rate", "8MB") as process:
        wait_until(lambda: partial.exists() and partial.stat().st_size >= PIECE, running=lambda: process.poll() is None)
        process.kill()
    held = partial.stat().st_size

    done = cli.ok("push", "m", "mirror", "--json").json

    assert held < len(WEIGHTS) and done["sent_bytes"] == len(WEIGHTS) - held // PIECE * PIECE
    assert (cli.folder / "mirror" / name_of(WEIGHTS)).read_bytes() == WEIGHTS


def test_an_interrupted_push_does_not_wait_for_its_rate_limit(cli: Cli):
    """Ctrl-C ends a push whose remaining bytes would take hours at the rate it was given."""
    filled(cli, {"model.bin": WEIGHTS})
    folder = cli.folder / "mirror/sha256"
    with cli.start("push", "m", "mirror", "--limit-rate", "1KB") as process:
        wait_until(lambda: bool(list(folder.rglob("*.unfinished"))), running=lambda: process.poll() is None)
        process.send_signal(2)
        process.communicate(timeout=PATIENCE_S)

    assert process.returncode == 130


# ---- what is never published


@pytest.mark.parametrize("compress", [False, True])
def test_a_damaged_blob_is_not_published_and_the_others_are(cli: Cli, compress: bool):
    """stat does not see the flipped bit; the piece table does, before anything of it has a name on the mirror."""
    filled(cli)
    rot(cli.root, WEIGHTS, 2 * PIECE + 5)

    ran = cli.run("push", "m", "mirror", "--json", *["--compress"] * compress)

    assert ran.code == 4 and ran.json["error"]["code"] == "INTEGRITY_FAIL"
    assert ran.json["error"]["hint"] == "run `modelstow verify --repair`, then push again"
    assert ran.json["error"]["details"]["faults"] == [{"kind": "corrupt", "digest": Digest.of(WEIGHTS)}]
    assert sorted(ran.json["sent"]) == sorted([Digest.of(CONFIG), Digest.of(NOISE)])
    published = names_in(cli.folder / "mirror")
    assert {name_of(CONFIG), name_of(NOISE)} <= published
    assert not {name_of(WEIGHTS), name_of(WEIGHTS, ".pzst")} & published
    assert cli.run("status", "--json").json["models"][0]["state"] == "CORRUPT"


def test_a_small_damaged_blob_is_not_published(cli: Cli):
    """It has no piece table: its name says what it should be."""
    filled(cli)
    rot(cli.root, CONFIG)

    ran = cli.run("push", "m", "mirror")

    assert ran.code == 4
    assert ran.err == (
        f"error: 1 blob is damaged, and was not published: {Digest.of(CONFIG).short}…\n"
        "hint: run `modelstow verify --repair`, then push again\n"
    )
    assert not (cli.folder / "mirror" / name_of(CONFIG)).exists()


def test_a_blob_whose_table_was_lost_is_read_whole_before_it_is_published(tmp_path: Path):
    """A table made of the bytes as they are would certify corruption."""
    store, sizes = store_of(tmp_path)
    for data in (WEIGHTS, NOISE):
        os.unlink(store.layout.table(Digest.of(data)))
    rot(store.layout.root, NOISE, 100)

    with pytest.raises(IntegrityError, match="1 blob is damaged"):
        push_of(store, tmp_path / "mirror").run(sizes)

    assert names_in(tmp_path / "mirror") == PLAIN - {name_of(NOISE), name_of(NOISE, ".pieces")}
    table = read_table(str(tmp_path / "mirror" / name_of(WEIGHTS, ".pieces")), Digest.of(WEIGHTS))
    assert table is not None and table.complete and table.state is TableState.PROVEN


def test_a_blob_that_cannot_be_read_is_not_the_mirrors_failure(tmp_path: Path):
    """A bad sector of this disk is not reported as a fault of the target, nor retried there."""
    tried = 0

    def read(start: int, stop: int) -> bytes:
        nonlocal tried
        tried += 1
        raise OSError(5, "Input/output error", "here")

    with pytest.raises(OSError, match="here"):
        FileSource().put(str(tmp_path / "x"), 10, read, lambda count: None)
    assert tried == 1


def test_blobs_that_are_not_in_the_store_are_a_mistake_of_the_user(cli: Cli):
    """Nothing is sent of the others either."""
    filled(cli)
    (cli.root / "blobs" / name_of(NOISE)).unlink()

    ran = cli.run("push", "m", "mirror")

    assert ran.code == 2 and not (cli.folder / "mirror").exists()
    assert "1 of 3 blobs are not in the store" in ran.err and "modelstow ensure" in ran.err


# ---- where it cannot be published


@pytest.mark.parametrize("scheme", ["http", "hf", "ftp"])
def test_a_target_that_cannot_be_written_to_is_a_mistake_of_the_user(cli: Cli, scheme: str):
    """Nothing is requested, and no password is printed."""
    filled(cli, {"config.json": CONFIG})
    with Origin() as origin:
        url = origin.url.replace("http://", f"{scheme}://me:canary-password@")

        ran = cli.run("push", "m", url, "--json")

        assert ran.code == 2 and ran.json["error"]["code"] == "INVALID_CONFIG", ran.err
        assert origin.requests == [] and "canary" not in ran.out + ran.err
        assert "s3://bucket/prefix" in ran.err


def test_offline_forbids_buckets_and_not_folders(cli: Cli):
    """``--offline`` is about networks."""
    filled(cli, {"config.json": CONFIG})

    bucket = cli.run("push", "m", "s3://bucket/models", "--offline", **settings("http://127.0.0.1:1"))
    folder = cli.run("push", "m", (cli.folder / "mirror").as_uri(), "--offline")

    assert bucket.code == 5 and "--offline" in bucket.err
    assert folder.code == 0 and names_in(cli.folder / "mirror") == {name_of(CONFIG)}


def test_a_file_where_the_folder_should_be_is_reported_at_the_first_attempt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A push does not try again what will not go away."""
    attempts, put = list[str](), FileSource.put

    def counted(source: FileSource, locator: str, *about: Any) -> int:
        attempts.append(locator)
        return put(source, locator, *about)

    store, sizes = store_of(tmp_path, {"config.json": CONFIG})
    (tmp_path / "mirror").write_bytes(b"")
    monkeypatch.setattr(FileSource, "put", counted)

    with pytest.raises(SourceError, match="cannot be written"):
        push_of(store, tmp_path / "mirror/deeper").run(sizes)

    assert len(attempts) == 1


def test_a_file_where_the_folder_should_be_is_an_error_with_a_hint(cli: Cli):
    """The command line exits with 5 and says what to check."""
    filled(cli, {"config.json": CONFIG})
    (cli.folder / "mirror").write_bytes(b"")

    ran = cli.run("push", "m", "mirror/deeper")

    assert ran.code == 5
    assert "cannot be written" in ran.err and "check the target folder" in ran.err


@contextmanager
def mounted(folder: Path, options: str) -> Iterator[Path]:
    folder.mkdir(exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    if os.getuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("cannot mount a tmpfs")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True, capture_output=True)


def test_a_full_target_is_reported_at_once_and_resumed_when_there_is_room(tmp_path: Path):
    """What was sent is kept."""
    store, sizes = store_of(tmp_path, {"model.bin": WEIGHTS})
    with mounted(tmp_path / "small", "size=12m") as disk:
        with pytest.raises(TargetFull, match="No space left") as caught:
            push_of(store, disk).run(sizes)
        assert caught.value.code == "NO_SPACE" and "free some room" in caught.value.hint
        subprocess.run(["mount", "-o", "remount,size=32m", str(disk)], check=True)

        done = push_of(store, disk).run(sizes)

        assert done.sent_bytes == len(WEIGHTS) - PIECE and (disk / name_of(WEIGHTS)).read_bytes() == WEIGHTS


def test_a_read_only_target_is_refused_with_a_hint(cli: Cli):
    """Exit 8: not authorised."""
    filled(cli, {"config.json": CONFIG})
    with mounted(cli.folder / "disk", "size=1m,ro") as disk:
        ran = cli.run("push", "m", disk)

    assert ran.code == 8
    assert "cannot be written (Read-only file system)" in ran.err and "check who may write" in ran.err


@pytest.mark.skipif(os.getuid() == 0, reason="root may write anywhere")
def test_a_folder_of_another_user_is_refused_with_a_hint(tmp_path: Path):
    """Exit 8: not authorised."""
    (tmp_path / "mirror").mkdir(mode=0o555)

    with pytest.raises(AccessDenied, match="cannot be written"):
        FileSource().put(str(tmp_path / "mirror/x/y"), 1, lambda start, stop: b"x", lambda count: None)


# ---- how fast


def test_limit_rate_holds_back_what_is_sent(tmp_path: Path):
    """A megabyte and a half at three kilobytes a second takes eight minutes, measured by a fake wait."""
    waited: list[float] = []

    class Patient(Event):
        def wait(self, timeout: float | None = None) -> bool:
            waited.append(timeout or 0.0)
            return False

    store, sizes = store_of(tmp_path, {"model.bin": weights(1_500_000)})
    pay = throttle(Settings(root=tmp_path, limit_rate=3000), Patient())

    push_of(store, tmp_path / "mirror", pay=pay).run(sizes)

    assert max(waited) > 400


def test_a_stopped_push_pays_for_nothing_more(tmp_path: Path):
    """Its threads end in the middle of the wait."""
    token = CancellationToken()
    store, sizes = store_of(tmp_path, {"model.bin": WEIGHTS})
    pay = throttle(Settings(root=tmp_path, limit_rate=1), token)
    push = push_of(store, tmp_path / "mirror", token=token, pay=pay)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(push.run, sizes)
        wait_until((tmp_path / "mirror").exists, running=lambda: not running.done())
        token.cancel()

        with pytest.raises(Cancelled):
            running.result(PATIENCE_S)


# ---- several at once


def test_two_pushes_into_one_folder_send_one_copy(cli: Cli):
    """The other waits, and finds it there."""
    filled(cli)
    argv = ("push", "m", "mirror", "--compress", "--json", "--limit-rate", "30MB")

    both = [cli.start(*argv), cli.start(*argv)]
    ran = [process.communicate(timeout=PATIENCE_S) for process in both]

    assert [process.returncode for process in both] == [0, 0], ran
    assert names_in(cli.folder / "mirror") == COMPRESSED_SUFFIX
    assert (cli.folder / "mirror" / name_of(WEIGHTS, ".pzst")).read_bytes() == packed(WEIGHTS)[1]


def test_two_that_put_the_same_do_not_write_into_one_file(tmp_path: Path):
    """Their bytes may differ, since another zstd packs differently; a mixture of both would be wrong for every reader."""
    ours, theirs = some_bytes(3 * PIECE, 1), some_bytes(3 * PIECE, 2)
    path, begun, resume = tmp_path / "deep/x", Event(), Event()

    def slow(start: int, stop: int) -> bytes:
        if start == PIECE:
            begun.set()
            assert resume.wait(PATIENCE_S)
        return ours[start:stop]

    waited = Event()

    def on_send(count: int) -> None:
        if count == 0:
            waited.set()

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(FileSource().put, str(path), len(ours), slow, lambda count: None)
        assert begun.wait(PATIENCE_S)
        second = pool.submit(FileSource().put, str(path), len(theirs), lambda start, stop: theirs[start:stop], on_send)
        assert waited.wait(PATIENCE_S)
        resume.set()

        assert (first.result(PATIENCE_S), second.result(PATIENCE_S)) == (len(ours), 0)
    assert path.read_bytes() == ours and list(path.parent.iterdir()) == [path]


# ---- buckets


@pytest.fixture(params=["moto", "rclone"])
def bucket(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    """An empty bucket ``mirror`` of a real server; the settings of boto3 are in the environment."""
    if request.param == "moto":
        endpoint = request.getfixturevalue("moto")
        use(monkeypatch, settings(endpoint))
        client = boto3.client("s3")
        client.create_bucket(Bucket="mirror")
        yield endpoint
        for row in client.list_objects_v2(Bucket="mirror").get("Contents", ()):
            client.delete_object(Bucket="mirror", Key=row["Key"])
        return
    (tmp_path / "buckets/mirror").mkdir(parents=True)
    with rclone(tmp_path / "buckets") as endpoint:
        use(monkeypatch, settings(endpoint))
        yield endpoint


def objects(prefix: str) -> set[str]:
    """The keys of the bucket below a prefix."""
    rows = boto3.client("s3").list_objects_v2(Bucket="mirror", Prefix=prefix).get("Contents", ())
    return {row["Key"].removeprefix(prefix) for row in rows}


def content(key: str) -> bytes:
    return bytes(boto3.client("s3").get_object(Bucket="mirror", Key=key)["Body"].read())


@pytest.mark.parametrize("compress", [False, True])
def test_a_bucket_is_filled_like_a_folder(cli: Cli, bucket: str, compress: bool):
    """In parts or at once; and what is there is not sent again."""
    filled(cli)
    argv = ("push", "m", "s3://mirror/models/", "--json", *["--compress"] * compress)

    done = cli.ok(*argv, **settings(bucket)).json
    again = cli.ok(*argv, **settings(bucket)).json

    assert objects("models/") == (COMPRESSED_SUFFIX if compress else PLAIN)
    assert (done["compressed"], len(done["sent"]), again["sent"], again["present"]) == (compress, 3, [], 3)
    assert content(f"models/{name_of(NOISE)}") == NOISE and content(f"models/{name_of(CONFIG)}") == CONFIG
    if compress:
        assert content(f"models/{name_of(WEIGHTS, '.pzst')}") == packed(WEIGHTS)[1]
    else:
        assert content(f"models/{name_of(WEIGHTS)}") == WEIGHTS


def test_an_interrupted_push_into_a_bucket_is_resumed_at_the_part(
    tmp_path: Path, moto: str, monkeypatch: pytest.MonkeyPatch
):
    """S3 keeps the parts of an upload that did not end."""
    use(monkeypatch, settings(moto))
    boto3.client("s3").create_bucket(Bucket="mirror")
    data = some_bytes(9 * PIECE + 1, seed=4)
    store, sizes = store_of(tmp_path, {"model.bin": data})
    table = 136 + 10 * 32

    with pytest.raises(Broken):
        push_of(store, "s3://mirror/part", pay=breaking(table + 7 * PIECE)).run(sizes)
    done = push_of(store, "s3://mirror/part").run(sizes)

    assert content(f"part/{name_of(data)}") == data
    assert done.sent_bytes == len(data) - 7 * PIECE
    assert not boto3.client("s3").list_multipart_uploads(Bucket="mirror").get("Uploads")


def test_a_push_into_a_server_that_cannot_list_parts_succeeds_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """rclone's server cannot report unfinished uploads, so that they are sent again."""
    (tmp_path / "buckets/mirror").mkdir(parents=True)
    store, sizes = store_of(tmp_path, {"model.bin": WEIGHTS})
    with rclone(tmp_path / "buckets") as endpoint:
        use(monkeypatch, settings(endpoint))
        with pytest.raises(Broken):
            push_of(store, "s3://mirror", pay=breaking(TABLE_BYTES[0] + 2 * PIECE)).run(sizes)

        push_of(store, "s3://mirror").run(sizes)

        assert content(name_of(WEIGHTS)) == WEIGHTS


@dataclass
class Begun:
    """A push of the weights into a bucket of moto, whose upload an earlier one left after the first piece."""

    store: BlobStore
    sizes: dict[Digest, int]
    url: str

    def push(self, pay: Callable[[int], object] = lambda count: None) -> Pushed:
        return push_of(self.store, self.url, pay=pay).run(self.sizes)

    def uploads(self) -> list[dict[str, str]]:
        """The unfinished uploads of the bucket."""
        return list(boto3.client("s3").list_multipart_uploads(Bucket="mirror").get("Uploads", ()))

    def there(self) -> bytes:
        """The object in the bucket at the blob's key."""
        return content(f"{self.url.removeprefix('s3://mirror/')}/{name_of(WEIGHTS)}")


@pytest.fixture
def begun(tmp_path: Path, moto: str, monkeypatch: pytest.MonkeyPatch) -> Begun:
    use(monkeypatch, settings(moto))
    boto3.client("s3").create_bucket(Bucket="mirror")
    begun = Begun(*store_of(tmp_path, {"model.bin": WEIGHTS}), f"s3://mirror/{tmp_path.name}")
    with pytest.raises(Broken):
        begun.push(breaking(TABLE_BYTES[0] + PIECE))
    assert begun.uploads()
    return begun


def test_an_upload_that_another_push_ends_is_no_failure(begun: Begun):
    """Both resumed an upload that an earlier push left; the second finds it gone, and the blob there."""
    ended = []

    def overtaken(count: int) -> None:
        if count > TABLE_BYTES[0] and not ended:
            ended.append(True)
            begun.push()

    done = begun.push(overtaken)

    assert ended and len(done.sent) == 1 and begun.there() == WEIGHTS
    assert not begun.uploads()


def test_an_upload_that_was_aborted_meanwhile_is_started_again(begun: Begun):
    """A bucket's own rules throw old uploads away."""
    aborted: list[object] = []
    mutex = Lock()

    def aborting(count: int) -> None:
        with mutex:
            if count > TABLE_BYTES[0] and not aborted:
                [row] = begun.uploads()
                boto3.client("s3").abort_multipart_upload(Bucket="mirror", Key=row["Key"], UploadId=row["UploadId"])
                aborted.append(row)

    begun.push(aborting)

    assert aborted and begun.there() == WEIGHTS
    assert not begun.uploads()


def test_refused_credentials_are_reported_with_exit_8(cli: Cli, tmp_path: Path):
    """The message holds no secret."""
    filled(cli, {"config.json": CONFIG})
    (tmp_path / "buckets/mirror").mkdir(parents=True)
    with rclone(tmp_path / "buckets") as endpoint:
        ran = cli.run("push", "m", "s3://mirror/x", "--json", **settings(endpoint, secret=SECRET + "-wrong"))

    assert ran.code == 8 and ran.json["error"]["code"] == "AUTH_FAIL"
    assert ran.json["sent"] == [] and SECRET not in ran.out + ran.err
    assert "AWS_SECRET_ACCESS_KEY" in ran.err


def test_a_missing_bucket_is_reported(cli: Cli, moto: str):
    """Exit 5: the target does not have it."""
    filled(cli, {"config.json": CONFIG})

    ran = cli.run("push", "m", "s3://no-such-bucket-at-all/x", **settings(moto))

    assert ran.code == 5 and "NoSuchBucket" in ran.err


def test_a_blob_of_many_pieces_is_checked_piece_by_piece(tmp_path: Path):
    """Each read checks only its own pieces; otherwise a large blob would take quadratic time."""
    store, _ = store_of(tmp_path, {"model.bin": WEIGHTS})
    rot(store.layout.root, WEIGHTS)

    with _Blob(store, Digest.of(WEIGHTS), len(WEIGHTS), Event()) as blob:
        assert blob.read(PIECE, 2 * PIECE) == WEIGHTS[PIECE : 2 * PIECE]
        assert blob.read(2 * PIECE, len(WEIGHTS)) == WEIGHTS[2 * PIECE :]
        for stop in (PIECE, len(WEIGHTS)):
            with pytest.raises(_Damaged):
                blob.read(0, stop)


def test_transient_failures_do_not_add_up_over_a_long_push(tmp_path: Path):
    """An attempt that got far gives all attempts back."""
    data = some_bytes(9 * PIECE)
    store, sizes = store_of(tmp_path, {"model.bin": data})
    broken: list[str] = []

    class Fragile(FileSource):
        def put(self, locator: str, size: int, read: ReadRange, on_send: OnSend) -> int:
            if size > PIECE and len(broken) < 5:
                broken.append(locator)
                on_send(9 * PIECE)
                raise ConnectionFailed("the connection broke", locator=locator)
            return super().put(locator, size, read, on_send)

    push_of(store, tmp_path / "mirror", registry=Registry({"": Fragile})).run(sizes)

    assert len(broken) == 5 and (tmp_path / "mirror" / name_of(data)).read_bytes() == data


def test_a_target_that_only_fails_is_given_up(tmp_path: Path):
    """After as many attempts as a source gets."""
    store, sizes = store_of(tmp_path, {"config.json": CONFIG})
    tried: list[str] = []

    class Dead(FileSource):
        def put(self, locator: str, size: int, read: ReadRange, on_send: OnSend) -> int:
            tried.append(locator)
            raise ConnectionFailed("the connection broke", locator=locator)

    with pytest.raises(ConnectionFailed):
        push_of(store, tmp_path / "mirror", registry=Registry({"": Dead})).run(sizes)

    assert len(tried) == 3


# ---- from Python


def test_an_ensurer_pushes_what_selectors_hold(tmp_path: Path):
    """As the command does, with the sources, retries and rate that the ensurer was given."""
    models = ensurer_of(tmp_path, lock_of({"m@1": {"v": FILES}}), memory(FILES))
    models.ensure("m")

    done = models.push(["m#v", "m"], tmp_path / "mirror", compress=True)

    assert names_in(tmp_path / "mirror") == COMPRESSED_SUFFIX
    assert len(done.sent) == len(FILES) and done.compressed == 1


def test_a_push_from_python_that_fails_raises_and_reports_what_was_sent(tmp_path: Path):
    """The damaged blob is named; the others are in the mirror, and counted."""
    models = ensurer_of(tmp_path, lock_of({"m@1": {"v": FILES}}), memory(FILES))
    models.ensure("m")
    rot(models.settings.root, NOISE)
    done = Pushed()

    with pytest.raises(IntegrityError, match=Digest.of(NOISE).short):
        models.push(["m"], tmp_path / "mirror", done=done)

    assert done.sent == sorted(Digest.of(data) for data in (CONFIG, WEIGHTS)) and done.damaged == [Digest.of(NOISE)]


def test_stopping_the_ensurer_ends_its_push(tmp_path: Path):
    """However low its rate limit; and the error says that the next push resumes there."""
    store_of(tmp_path)
    settings = Settings(root=tmp_path / "root", lockfile=tmp_path / "models.lock", limit_rate=1)
    models = ModelEnsurer.open(settings=settings)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(models.push, ["m"], tmp_path / "mirror")
        wait_until((tmp_path / "mirror").exists, running=lambda: not running.done())
        models.token.cancel()

        with pytest.raises(Cancelled, match="the next push continues there"):
            running.result(PATIENCE_S)


def test_a_push_of_a_model_that_is_not_locked_touches_nothing(tmp_path: Path):
    """Not even a store is created for it."""
    models = ensurer_of(tmp_path, lock_of({"m@1": {"v": FILES}}))

    with pytest.raises(ModelNotFoundError):
        models.push(["other"], tmp_path / "mirror")

    assert not (tmp_path / "root").exists() and not (tmp_path / "mirror").exists()


def test_everything_can_be_pushed_at_once(cli: Cli):
    """Every variant of the lockfile; and the error says what is missing where neither is named."""
    filled(cli)

    assert len(cli.ok("push", "--all", "mirror", "--json").json["sent"]) == len(FILES)
    assert names_in(cli.folder / "mirror") == PLAIN
    refused = cli.run("push", "mirror")
    assert refused.code == 2 and "or --all" in refused.err
