"""The store's format file and its folders."""

import json
import os
import shutil
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from store_fixtures import SMALL, store_at

from modelstow.cas import BlobStore, Digest, Layout, StoreFormatError, durable
from modelstow.cas import store as store_module
from modelstow.cas.errors import Cause
from modelstow.cas.layout import StoreConfig


def write_config(tmp_path: Path, **changes: object) -> str:
    """A new store whose modelstow.json says something else; its text."""
    store = store_at(tmp_path)
    text = json.dumps({**json.loads(store.layout.config.read_text()), **changes})
    store.layout.config.write_text(text)
    return text


@pytest.mark.parametrize(
    "changes",
    [
        {"format": 2},
        {"format": "1"},
        {"format": None},
        {"features": {"incompat": ["sharded"], "ro_compat": []}},
        {"features": []},
        {"features": None},
        {"features": {"incompat": 5}},
        {"epoch": None, "format": 0},
    ],
)
@pytest.mark.parametrize("how", [BlobStore.open, BlobStore.open_existing, BlobStore.open_readonly])
def test_a_store_of_another_format_or_feature_is_refused_and_not_rewritten(tmp_path: Path, changes: dict, how):
    """Whatever an older modelstow would do to it could be wrong."""
    text = write_config(tmp_path, **changes)

    with pytest.raises(StoreFormatError):
        how(tmp_path / "root")
    assert (tmp_path / "root/modelstow.json").read_text() == text


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"null", b'{"format": 1}', b"\xff\xfe", b"[" * 100_000])
def test_a_torn_format_file_is_refused_and_not_rewritten(tmp_path: Path, text: bytes):
    """It is not taken for an empty folder in which a store may be made."""
    store = store_at(tmp_path)
    store.layout.config.write_bytes(text)

    with pytest.raises(StoreFormatError):
        BlobStore.open(tmp_path / "root")
    assert store.layout.config.read_bytes() == text


def test_the_refusal_of_a_newer_store_says_what_was_found(tmp_path: Path):
    """And what to do about it."""
    write_config(tmp_path, format=7)

    with pytest.raises(StoreFormatError, match="format 7") as caught:
        BlobStore.open(tmp_path / "root")
    assert (
        caught.value.details == {"found_version": 7, "supported_versions": [1]} and caught.value.cause is Cause.LATER_FORMAT
    )
    assert caught.value.code == "SCHEMA_VERSION_MISMATCH"


def test_an_unknown_ro_compat_feature_allows_reading_and_forbids_writing(tmp_path: Path):
    """As in ext4."""
    digest = store_at(tmp_path).ingest.add_bytes(SMALL)
    text = write_config(tmp_path, features={"incompat": [], "ro_compat": ["views"]})

    store = BlobStore.open(tmp_path / "root")

    assert store.blobs.stat(digest, len(SMALL)).state.value == "intact"
    with pytest.raises(StoreFormatError, match="views"):
        store.prepare()
    assert store.layout.config.read_text() == text


def test_what_the_format_file_says_reads_back(tmp_path: Path):
    """Unknown keys are left alone."""
    config = StoreConfig(shared=True, ro_compat=("x",))

    assert StoreConfig.parse(config.text(), where=tmp_path) == config
    write_config(tmp_path, comment="mine")
    assert BlobStore.open(tmp_path / "root").config.format == 1


def test_opening_twice_gives_the_same_store(tmp_path: Path):
    """Format, epoch and features are written once."""
    first = store_at(tmp_path)
    before = first.layout.config.read_bytes()

    again = BlobStore.open(tmp_path / "root", shared=True)

    assert again.config == first.config and first.layout.config.read_bytes() == before
    assert first.layout.epoch.read_text() == first.config.epoch


def test_many_who_make_a_store_at_once_agree_on_it(tmp_path: Path):
    """One epoch, whichever process was first."""
    with ThreadPoolExecutor(8) as pool:
        configs = [f.result().config for f in [pool.submit(BlobStore.open, tmp_path / "root") for _ in range(8)]]

    assert len(set(configs)) == 1
    assert (tmp_path / "root/state/epoch").read_text() == configs[0].epoch


def test_looking_makes_nothing(tmp_path: Path):
    """Where no store is, none is made."""
    assert BlobStore.open_existing(tmp_path / "root") is None
    assert list(BlobStore.open_readonly(tmp_path / "root").blobs.entries()) == []
    with pytest.raises(FileNotFoundError):
        BlobStore.open(tmp_path / "root", create=False)
    assert list(tmp_path.iterdir()) == []


def test_all_fan_out_folders_are_made_at_once(tmp_path: Path):
    """So that a sweep can never take one from under a commit (C12)."""
    store = store_at(tmp_path)

    assert sorted(os.listdir(store.layout.blobs)) == [f"{n:02x}" for n in range(256)]


@pytest.mark.parametrize("lost", ["state", "partial", "quarantine", "trash", "pins", "blobs/sha256/00"])
def test_folders_that_were_lost_are_made_again_before_the_first_write(tmp_path: Path, lost: str):
    """Losing one never loses a model."""
    store = store_at(tmp_path)
    digest = store.ingest.add_bytes(SMALL)
    shutil.rmtree(store.layout.root / lost)

    store = BlobStore.open(tmp_path / "root")
    store.prepare()

    assert (store.layout.root / lost).is_dir()
    assert store.blobs.stat(digest, len(SMALL)).state.value == "intact"
    store.ingest.add_bytes(b"more")


def test_a_folder_that_is_there_keeps_its_mode(tmp_path: Path):
    """A mount point that is 0777 is no reason to refuse or to change it (M1)."""
    (tmp_path / "root").mkdir()
    os.chmod(tmp_path / "root", 0o777)

    store_at(tmp_path).prepare()

    assert stat.S_IMODE((tmp_path / "root").stat().st_mode) == 0o777


def test_a_blobs_path_is_fixed_by_its_digest():
    """Any static web server over this folder is a mirror."""
    layout, digest = Layout(Path("/r")), Digest.of(b"x")

    assert layout.blob(digest) == f"/r/blobs/sha256/{digest.hex[:2]}/{digest.hex}"
    assert layout.table(digest) == layout.blob(digest) + ".pieces"
    assert layout.partial(digest) == f"/r/partial/{digest.hex}"


def test_the_folders_of_a_new_store_are_durable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Each folder that was made is synced in the one above, with few syncs (C3, C7)."""
    made: list[Path] = []
    synced: list[Path] = []
    mkdir, sync = Path.mkdir, durable.fsync_folder

    def makes(path: Path, *args: object, **more: object) -> None:
        mkdir(path, *args, **more)  # type: ignore[arg-type]
        made.append(path)

    def syncs(path: Path | str) -> None:
        synced.append(Path(path))
        sync(path)

    monkeypatch.setattr(Path, "mkdir", makes)
    for module in (durable, store_module):
        monkeypatch.setattr(module, "fsync_folder", syncs)
    store = BlobStore.open(tmp_path / "a/b/root")
    store.make_state_dir("roots")

    assert {path.parent for path in made} <= {*synced} and tmp_path in synced
    assert len(made) > 270 and len(synced) < 12
    again = len(synced)
    BlobStore.open(tmp_path / "a/b/root").prepare()
    assert len(synced) == again, "nothing is synced where nothing is made"
