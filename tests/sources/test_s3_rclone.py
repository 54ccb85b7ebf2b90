"""rclone's S3 server: written by others than boto3 and moto. It sends ranges with status 200 and keeps no checksums."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from builders import PIECE, Cli, assert_sound, ensurer_of, leftovers, lock_of, manifest_of, some_bytes, tree_of, write_lock
from s3servers import KEY, SECRET, rclone, settings, use

from modelstow.backends import AccessDenied, SourceError
from modelstow.backends.conformance import TEN, SourceContract
from modelstow.backends.faulty import FaultySource
from modelstow.backends.s3.client import S3Source
from modelstow.reconcile.transfer.retry import RetryPolicy, RetrySchedule

pytestmark = pytest.mark.slow

_FILES = {"config.json": b'{"layers": 2}', "model.bin": some_bytes(3 * PIECE + 1000)}


def _fill(folder: Path) -> Path:
    """A folder that rclone serves: the bucket ``models``."""
    objects = {f"m/{name}": data for name, data in SourceContract.OBJECTS.items()}
    objects |= {"m-other/x": b"not below m/", **{f"v1/{name}": data for name, data in _FILES.items()}}
    for name, data in objects.items():
        path = folder / "models" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


@pytest.fixture(scope="module")
def private(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with rclone(_fill(tmp_path_factory.mktemp("private"))) as endpoint:
        yield endpoint


@pytest.fixture(scope="module")
def public(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with rclone(_fill(tmp_path_factory.mktemp("public")), keys="") as endpoint:
        yield endpoint


class TestRclone(SourceContract):
    @pytest.fixture(autouse=True)
    def serve(self, private: str, monkeypatch: pytest.MonkeyPatch) -> None:
        use(monkeypatch, settings(private))

    def folder(self) -> str:
        return "s3://models/m"

    def make(self) -> S3Source:
        return S3Source()

    def test_a_range_comes_as_one(self) -> None:
        """Whatever status it has (N6)."""
        body = self.make().open("s3://models/m/ten", start=3, stop=7)
        body.close()

        assert (body.start, body.total, body.ranged) == (3, 10, True)


class TestAnonymous(SourceContract):
    """The same without any credentials, against a server that wants none."""

    @pytest.fixture(autouse=True)
    def serve(self, public: str, monkeypatch: pytest.MonkeyPatch) -> None:
        use(monkeypatch, settings(public, key="", secret=""))

    def folder(self) -> str:
        return "s3://models/m"

    def make(self) -> S3Source:
        return S3Source()


@pytest.mark.parametrize(("key", "secret"), [("WRONGKEY", SECRET), (KEY, "canary-of-a-wrong-secret"), ("", "")])
def test_wrong_keys_and_none_are_refused(private: str, monkeypatch: pytest.MonkeyPatch, key: str, secret: str):
    """On listing, reading and asking for the size."""
    use(monkeypatch, settings(private, key, secret))
    source = S3Source()

    for ask in (source.listing, source.open, source.size):
        with pytest.raises(AccessDenied) as caught:
            ask("s3://models/m/ten")
        assert caught.value.hint and not [s for s in (SECRET, "canary") if s in str(caught.value) + caught.value.hint]


def test_lock_and_reconcile_from_a_bucket(private: str, cli: Cli):
    """What keeps no checksums is read once, by lock; another machine then fetches by the lock."""
    (cli.folder / "models.toml").write_text(manifest_of("s3://models/v1"))

    cli.ok("lock", **settings(private))
    done = cli.ok("reconcile", "--json", **settings(private)).json

    assert (done["summary"]["fetched_bytes"], done["summary"]["reused_blobs"]) == (0, 2)
    elsewhere = cli.ok("reconcile", "--json", "--root", str(cli.folder / "elsewhere"), **settings(private)).json
    assert elsewhere["summary"]["fetched_bytes"] == sum(map(len, _FILES.values()))
    for tree in (*done["trees"], *elsewhere["trees"]):
        assert tree_of(Path(tree["path"])) == _FILES
    assert_sound(cli.folder / "elsewhere")
    assert not leftovers(cli.folder / "elsewhere")


def test_a_cut_download_is_resumed(private: str, cli: Cli, monkeypatch: pytest.MonkeyPatch):
    """The pieces that arrived before the cut are not asked for again."""
    use(monkeypatch, settings(private))
    lock = lock_of({"m@1": {"all": {"model.bin": _FILES["model.bin"]}}}, ["s3://models/v1"])
    monkeypatch.setenv("MODELSTOW_CONCURRENCY", "1")  # another connection would resume it
    once = RetryPolicy(transient=RetrySchedule(attempts=1))
    faulty = FaultySource(S3Source(), cuts=[PIECE + 5])
    with pytest.raises(Exception, match="connection dropped"):
        ensurer_of(cli.folder, lock, sources={"s3": faulty}, retry=once).ensure("m")

    write_lock(cli.folder, lock)
    done = cli.ok("reconcile", "--json", **settings(private)).json

    assert done["summary"]["resumed_bytes"] == PIECE
    assert done["summary"]["fetched_bytes"] == len(_FILES["model.bin"]) - PIECE
    assert tree_of(Path(done["trees"][0]["path"])) == {"model.bin": _FILES["model.bin"]}


def test_an_object_that_changed_is_not_taken_for_the_old(private: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """rclone keeps no versions and ignores If-Match: the length or the digest shows it (N7)."""
    use(monkeypatch, settings(private))
    for was in (TEN[::-1], TEN + b"more"):
        lock = lock_of({"m@1": {"all": {"ten": was}}}, ["s3://models/m"])
        with pytest.raises(Exception) as caught:
            ensurer_of(tmp_path / str(len(was)), lock).ensure("m")
        assert getattr(caught.value, "code", "") in ("CHECKSUM_FAIL", "SIZE_MISMATCH")


def test_a_bucket_that_is_not_there_is_an_error(private: str, monkeypatch: pytest.MonkeyPatch):
    """A permanent one: asking again would not make it."""
    use(monkeypatch, settings(private))

    with pytest.raises(SourceError) as caught:
        S3Source().listing("s3://nowhere/m")

    assert not caught.value.transient
