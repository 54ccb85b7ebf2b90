"""What one ensurer promises: how it fetches a model, reports its state, verifies it, and remembers what failed."""

from __future__ import annotations

import math
import os
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from builders import PATIENCE_S, assert_sound, blobs_of, ensurer_of, leftovers, lock_of, tree_of
from fixtures import Disk, WatchedSource, damage, locked, put, served, snapshot

from modelstow import (
    ChecksumError,
    IncompleteDownloadError,
    LockTimeoutError,
    ModelEnsurer,
    ModelNotFoundError,
    ModelState,
    NoSpaceError,
    SizeMismatchError,
    SourceUnavailableError,
)
from modelstow.backends.faulty import FaultySource
from modelstow.backends.memory import MemorySource
from modelstow.cas import BlobStore, Digest, inventory, locks
from modelstow.cas.scrub import Level
from modelstow.reconcile.events.events import Event, TaskAdvanced
from modelstow.reconcile.retention.collector import Collector
from modelstow.reconcile.settings import Settings
from modelstow.reconcile.transfer.source_health import FailureTable

FILES = {"model.bin": b"x" * 1000, "config.json": b"x" * 100}
FP32 = {"model.bin": b"x" * 2000, "config.json": b"x" * 100}
VARIANTS = {"fp16": FILES, "fp32": FP32}
KEY = "test-model@1.0.0"
FIRST, SECOND = "mock://test-model", "mock2://test-model"
MODEL, CONFIG = f"{FIRST}/fp16/model.bin", f"{FIRST}/fp16/config.json"
MIB = 1 << 20


class Clock:
    """A clock that moves only when it is set."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


def settings_of(folder: Path, **more) -> Settings:
    return Settings(root=folder / "root", lockfile=folder / "models.lock", **more)


def world(folder: Path, objects=None, **more) -> tuple[ModelEnsurer, WatchedSource]:
    """An ensurer of test-model with one source, which serves *objects* (default: what it should)."""
    source = WatchedSource(MemorySource(served(VARIANTS, FIRST) if objects is None else objects))
    return ensurer_of(folder, locked(KEY, VARIANTS, [FIRST]), sources={"mock": source}, **more), source


def two_sources(folder: Path, **more) -> tuple[ModelEnsurer, WatchedSource, WatchedSource]:
    """An ensurer of test-model whose first source is broken and whose second works; blobs are fetched one by one."""
    failing = WatchedSource(MemorySource(served(VARIANTS, FIRST)), broken="mock download failure")
    working = WatchedSource(MemorySource(served(VARIANTS, SECOND)))
    lock = locked(KEY, VARIANTS, [FIRST, SECOND])
    more.setdefault("settings", settings_of(folder, connections=1))
    models = ensurer_of(folder, lock, sources={"mock": failing, "mock2": working}, **more)
    return models, failing, working


def litter(folder: Path, size: int) -> None:
    """Leave a blob of *size* bytes in the store that nothing keeps: an older model, reconciled and given up."""
    old = b"o" * size
    source = MemorySource({"mem://origin/m/model.bin": old})
    ensurer_of(folder, lock_of({"old-model@1.0.0": {"fp16": {"model.bin": old}}}), source).reconcile()
    ensurer_of(folder, lock_of({}), source).reconcile()
    assert list(blobs_of(folder / "root")) == [Digest.of(old).hex]


@pytest.fixture
def collections(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The bytes that each garbage collection reclaimed; the collections themselves are real."""
    reclaimed: list[int] = []
    collect = Collector.collect

    def counted(self, *args, **options):
        result = collect(self, *args, **options)
        reclaimed.append(result.reclaimed_bytes)
        return result

    monkeypatch.setattr(Collector, "collect", counted)
    return reclaimed


# ---- ensure


def test_a_new_model_is_fetched_and_put_on_record(tmp_path: Path):
    """A model that is nowhere is downloaded once, and its files are the proven blobs themselves (B1)."""
    models, source = world(tmp_path)

    path = models.ensure("test-model", "fp16")

    assert path == tmp_path / "root/models/test-model@1.0.0/fp16"
    assert tree_of(path) == FILES
    assert source.asked == {MODEL: 1, CONFIG: 1}
    blobs = blobs_of(tmp_path / "root")
    assert {blob.stat().st_ino for blob in blobs.values()} == {file.stat().st_ino for file in path.iterdir()}
    assert {blob.stat().st_mtime for blob in blobs.values()} == {Digest.of(data).mtime for data in FILES.values()}
    record = BlobStore.open_readonly(tmp_path / "root").trees.read(f"models/{KEY}/fp16")
    assert record is not None and record.labels["model"] == KEY and len(record.files) == 2
    assert_sound(tmp_path / "root")


def test_a_complete_model_is_returned_without_a_download(tmp_path: Path):
    """A complete model costs another process no request and no write (B2)."""
    world(tmp_path)[0].ensure("test-model", "fp16")
    models, source = world(tmp_path, {})
    before = snapshot(tmp_path / "root/models") | snapshot(tmp_path / "root/blobs")

    path = models.ensure("test-model", "fp16")

    assert path == models.local_path("test-model", "fp16") and tree_of(path) == FILES
    assert source.calls == 0
    assert snapshot(tmp_path / "root/models") | snapshot(tmp_path / "root/blobs") == before


def test_force_downloads_over_what_is_there(tmp_path: Path):
    """A forced download happens exactly once and replaces old content (B3)."""
    models, source = world(tmp_path)
    put(models.local_path("test-model", "fp16"), {"model.bin": b"old content"})

    path = models.ensure("test-model", "fp16", force_redownload=True)

    assert tree_of(path) == FILES
    assert source.asked == {MODEL: 1, CONFIG: 1}
    assert leftovers(tmp_path / "root") == []


def test_force_downloads_a_complete_model_again_exactly_once(tmp_path: Path):
    """A forced download of a complete model asks for each file once more (B3)."""
    models, source = world(tmp_path)
    models.ensure("test-model", "fp16")
    source.forget()

    path = models.ensure("test-model", "fp16", force_redownload=True)

    assert tree_of(path) == FILES
    assert source.asked == {MODEL: 1, CONFIG: 1}


def test_too_little_space_is_reported_before_the_first_byte(tmp_path: Path):
    """Short of space, ensure refuses with the figures and a way out, having asked no source (B4)."""
    models, source = world(tmp_path, free_bytes=lambda: 500, settings=settings_of(tmp_path, min_free=100))

    with pytest.raises(NoSpaceError) as caught:
        models.ensure("test-model", "fp16")

    assert caught.value.code == "NO_SPACE"
    assert caught.value.details["bytes_needed"] == 1200, "1100 bytes of files and a margin of 100"
    assert caught.value.details["bytes_available"] == 500
    assert caught.value.details["path"] == str(tmp_path / "root")
    assert "modelstow gc" in caught.value.hint
    assert source.calls == 0
    assert leftovers(tmp_path / "root") == []


def test_garbage_is_swept_to_make_room(tmp_path: Path, collections: list[int]):
    """Short of space, ensure collects garbage once and continues if that is enough (B5)."""
    litter(tmp_path, 1500)
    disk = Disk(tmp_path / "root", capacity=2000)
    models, source = world(tmp_path, free_bytes=disk, settings=settings_of(tmp_path, min_free=100))
    assert disk() == 500

    path = models.ensure("test-model", "fp16")

    assert tree_of(path) == FILES
    assert collections == [1500], "one collection, which made room"
    assert disk() == 2000 - 1100
    assert source.asked == {MODEL: 1, CONFIG: 1}


def test_too_little_garbage_is_swept_once_and_then_reported(tmp_path: Path, collections: list[int]):
    """Where garbage is not enough, ensure has collected once and reports what is free now (B6)."""
    litter(tmp_path, 100)
    disk = Disk(tmp_path / "root", capacity=600)
    models, source = world(tmp_path, free_bytes=disk)
    assert disk() == 500

    with pytest.raises(NoSpaceError) as caught:
        models.ensure("test-model", "fp16")

    assert collections == [100]
    assert (caught.value.details["bytes_needed"], caught.value.details["bytes_available"]) == (1100, 600)
    assert source.calls == 0


def test_the_next_source_takes_over(tmp_path: Path):
    """A source that fails is asked exactly once, and the next one gives everything (B7)."""
    models, failing, working = two_sources(tmp_path)

    path = models.ensure("test-model", "fp16")

    assert tree_of(path) == FILES
    assert failing.calls == 1
    assert working.asked == {f"{SECOND}/fp16/model.bin": 1, f"{SECOND}/fp16/config.json": 1}


def test_when_every_source_fails_the_error_names_each(tmp_path: Path):
    """When no source works, the error is SOURCE_UNAVAILABLE and names every source with its reason (B8)."""
    models, failing, working = two_sources(tmp_path)
    working.broken = "no route to host"

    with pytest.raises(SourceUnavailableError) as caught:
        models.ensure("test-model", "fp16")

    assert caught.value.code == "SOURCE_UNAVAILABLE"
    reasons = {row["source"]: row["reason"] for row in caught.value.details["sources"]}
    assert {source.split("/fp16/")[0]: reason for source, reason in reasons.items()} == {
        FIRST: "mock download failure",
        SECOND: "no route to host",
    }
    assert failing.calls >= 1 and working.calls >= 1
    assert models.status("test-model", "fp16").state is ModelState.NOT_PRESENT


def test_wrong_bytes_are_a_checksum_error_that_names_the_file(tmp_path: Path):
    """Bytes of the right length that hash to something else are asked once more and then refused (B9)."""
    wrong = b"wrong content".ljust(1000, b"\0")
    models, source = world(tmp_path, served(VARIANTS, FIRST) | {MODEL: wrong})

    with pytest.raises(ChecksumError) as caught:
        models.ensure("test-model", "fp16")

    assert caught.value.code == "CHECKSUM_FAIL"
    assert "model.bin" in caught.value.details["file_path"]
    assert caught.value.details["expected"] == str(Digest.of(FILES["model.bin"]))
    assert caught.value.details["actual"] == str(Digest.of(wrong))
    assert source.asked[MODEL] == 2
    assert Digest.of(FILES["model.bin"]).hex not in blobs_of(tmp_path / "root")
    assert_sound(tmp_path / "root")


def test_a_wrong_length_is_a_size_mismatch(tmp_path: Path):
    """A file of another length than the lockfile says is refused with both figures (B10)."""
    models, _ = world(tmp_path, served(VARIANTS, FIRST) | {MODEL: b"x" * 500})

    with pytest.raises(SizeMismatchError) as caught:
        models.ensure("test-model", "fp16")

    assert caught.value.code == "SIZE_MISMATCH"
    assert (caught.value.details["expected"], caught.value.details["actual"]) == (1000, 500)
    assert "model.bin" in caught.value.details["file_path"]


def test_a_file_that_the_source_lacks_is_an_incomplete_download(tmp_path: Path):
    """A source without one of the files is an incomplete download that names the file (B11)."""
    models, _ = world(tmp_path, {MODEL: FILES["model.bin"]})

    with pytest.raises(IncompleteDownloadError) as caught:
        models.ensure("test-model", "fp16")

    assert caught.value.code == "INCOMPLETE_DOWNLOAD"
    assert caught.value.details["missing_files"] == ["config.json"]


# ---- status


def test_what_is_nowhere_is_not_present(tmp_path: Path):
    """Without a tree every file is missing and all bytes are needed (B12)."""
    models, source = world(tmp_path)

    status = models.status("test-model", "fp16")

    assert status.state is ModelState.NOT_PRESENT
    assert status.missing_files == ("config.json", "model.bin")
    assert status.bytes_needed == 1100
    assert source.calls == 0 and not (tmp_path / "root").exists()


def test_what_was_verified_is_complete(tmp_path: Path):
    """A model that is on record as verified is complete for another process too (B13)."""
    world(tmp_path)[0].ensure("test-model", "fp16")
    models, _ = world(tmp_path, {})

    status = models.status("test-model", "fp16")

    assert status.state is ModelState.COMPLETE
    assert (status.missing_files, status.corrupt_files, status.bytes_needed) == ((), (), 0)


def test_what_lacks_a_file_is_partial(tmp_path: Path):
    """With the weights there and the config gone, the config alone is missing and needed (B14)."""
    models, _ = world(tmp_path)
    path = models.ensure("test-model", "fp16")
    (path / "config.json").unlink()
    blobs_of(tmp_path / "root")[Digest.of(FILES["config.json"]).hex].unlink()

    status = models.status("test-model", "fp16")

    assert status.state is ModelState.PARTIAL
    assert (status.missing_files, status.corrupt_files) == (("config.json",), ())
    assert status.bytes_needed == 100


def test_a_file_of_unknown_origin_next_to_a_missing_one_is_partial(tmp_path: Path):
    """Weights that the user put there count as possibly right; only the missing config is needed (B14)."""
    models, _ = world(tmp_path)
    put(models.local_path("test-model", "fp16"), {"model.bin": FILES["model.bin"]})

    status = models.status("test-model", "fp16")

    assert status.state is ModelState.PARTIAL
    assert (status.missing_files, status.corrupt_files) == (("config.json",), ())
    assert status.bytes_needed == 100


def test_a_cut_file_is_corrupt_and_needed_whole(tmp_path: Path):
    """Weights cut to half their length are corrupt, not missing, and count whole (B15)."""
    models, _ = world(tmp_path)
    path = models.ensure("test-model", "fp16")
    damage(path / "model.bin", b"x" * 500)

    status = models.status("test-model", "fp16")

    assert status.state is ModelState.CORRUPT
    assert (status.missing_files, status.corrupt_files) == ((), ("model.bin",))
    assert status.bytes_needed == 1000


def test_a_short_file_of_unknown_origin_is_corrupt_too(tmp_path: Path):
    """A file that the user put there with the wrong length is corrupt and needed whole (B15)."""
    models, _ = world(tmp_path)
    put(models.local_path("test-model", "fp16"), {"model.bin": b"x" * 500, "config.json": FILES["config.json"]})

    status = models.status("test-model", "fp16")

    assert status.state is ModelState.CORRUPT
    assert (status.missing_files, status.corrupt_files) == ((), ("model.bin",))
    assert status.bytes_needed == 1000


def test_a_model_that_is_being_read_is_verifying(tmp_path: Path):
    """While a verification reads a model, others see VERIFYING, and COMPLETE when it is over (B28)."""
    models, _ = world(tmp_path)
    models.ensure("test-model", "fp16")
    reading, gate = threading.Event(), threading.Event()

    def hold(event: Event) -> None:
        if isinstance(event, TaskAdvanced):
            reading.set()
            assert gate.wait(PATIENCE_S)

    models.events.subscribe(hold)
    with ThreadPoolExecutor(1) as pool:
        verified = pool.submit(models.verify, ["test-model#fp16"], Level.FULL)
        try:
            assert reading.wait(PATIENCE_S)
            during = models.status("test-model", "fp16")
            other = models.status("test-model", "fp32")
        finally:
            gate.set()
        audit, _ = verified.result(PATIENCE_S)

    assert during.state is ModelState.VERIFYING and other.state is ModelState.NOT_PRESENT
    assert audit.faults == () and audit.blobs == 2
    assert models.status("test-model", "fp16").state is ModelState.COMPLETE


# ---- verify


def test_good_content_verifies(tmp_path: Path):
    """A model with the right content verifies file by file (B16)."""
    models, _ = world(tmp_path)
    models.ensure("test-model", "fp16")

    report = models.verify_integrity("test-model", "fp16")

    assert report.success and report.error_message == ""
    assert report.verified_files == ("config.json", "model.bin")
    assert (report.failed_files, report.missing_files) == ((), ())


def test_an_empty_folder_has_every_file_missing(tmp_path: Path):
    """In an empty folder nothing is verified, nothing has failed, everything is missing (B17)."""
    models, _ = world(tmp_path)
    models.local_path("test-model", "fp16").mkdir(parents=True)

    report = models.verify_integrity("test-model", "fp16")

    assert not report.success
    assert (report.verified_files, report.failed_files) == ((), ())
    assert report.missing_files == ("config.json", "model.bin")


def test_an_emptied_tree_has_every_file_missing(tmp_path: Path):
    """A tree whose files were removed by hand has them missing, not failed (B17)."""
    models, _ = world(tmp_path)
    path = models.ensure("test-model", "fp16")
    for file in path.iterdir():
        file.unlink()

    report = models.verify_integrity("test-model", "fp16")

    assert not report.success
    assert (report.verified_files, report.failed_files) == ((), ())
    assert report.missing_files == ("config.json", "model.bin")


def test_wrong_content_of_the_right_length_fails_verification(tmp_path: Path):
    """Files whose bytes rotted while length and times stayed are failed, not missing (B18)."""
    models, _ = world(tmp_path)
    path = models.ensure("test-model", "fp16")
    damage(path / "model.bin", b"z" * 1000)
    damage(path / "config.json", b"z" * 100)

    report = models.verify_integrity("test-model", "fp16")

    assert not report.success
    assert report.failed_files == ("config.json", "model.bin")
    assert (report.verified_files, report.missing_files) == ((), ())


def test_wrong_content_of_unknown_origin_fails_verification(tmp_path: Path):
    """Wrong files that the user put there are failed, not missing, though the store has no such blobs (B18)."""
    models, _ = world(tmp_path)
    put(models.local_path("test-model", "fp16"), {"model.bin": b"z" * 1000, "config.json": b"z" * 100})

    report = models.verify_integrity("test-model", "fp16")

    assert not report.success
    assert report.failed_files == ("config.json", "model.bin")
    assert (report.verified_files, report.missing_files) == ((), ())


def test_a_model_without_a_folder_verifies_as_missing(tmp_path: Path):
    """Without a folder every file is missing, and the message says that it does not exist (B29)."""
    models, _ = world(tmp_path)

    report = models.verify_integrity("test-model", "fp16")

    assert not report.success
    assert (report.verified_files, report.failed_files) == ((), ())
    assert report.missing_files == ("config.json", "model.bin")
    assert "does not exist" in report.error_message


def test_a_wrong_length_fails_verification_and_spares_the_rest(tmp_path: Path):
    """A cut file is failed, and the file next to it is verified all the same (B30)."""
    models, _ = world(tmp_path)
    path = models.ensure("test-model", "fp16")
    damage(path / "model.bin", b"x" * 500)

    report = models.verify_integrity("test-model", "fp16")

    assert not report.success
    assert report.verified_files == ("config.json",)
    assert report.failed_files == ("model.bin",)
    assert report.missing_files == ()


# ---- figures, locks, what is left behind


def test_the_estimate_is_what_is_not_on_disk_yet(tmp_path: Path):
    """The estimate is the size of all files at first, and nothing once they are there (B19)."""
    models, source = world(tmp_path)

    before = models.estimate_download_size("test-model", "fp16")
    asked = source.calls
    models.ensure("test-model", "fp16")

    assert (before, asked) == (1100, 0)
    assert models.estimate_download_size("test-model", "fp16") == 0


def test_each_lock_is_taken_once_and_for_a_finite_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """One ensure takes the lock of its tree and of each blob exactly once, never with an infinite time-out (B20)."""
    taken: list[tuple[str, float]] = []
    acquire = locks.acquire

    def noted(path: Path, *, timeout_s: float = 300.0, **options: object) -> locks.Lock:
        taken.append((path.name, timeout_s))
        return acquire(path, timeout_s=timeout_s, **options)

    monkeypatch.setattr(locks, "acquire", noted)
    models, _ = world(tmp_path)

    models.ensure("test-model", "fp16")

    store = BlobStore.open(tmp_path / "root")
    names = Counter(name for name, _ in taken)
    assert names["tree-" + inventory.tree_id(f"models/{KEY}/fp16")] == 1
    assert [names[store.blob_lock_path(Digest.of(data)).name] for data in FILES.values()] == [1, 1]
    assert all(math.isfinite(timeout) and timeout <= 300 for _, timeout in taken)


def test_a_lock_that_is_not_had_in_time_is_an_error_that_names_its_holder(tmp_path: Path):
    """While another holder has the model's lock, ensure gives up after its time-out and names the holder (B20)."""
    models, _ = world(tmp_path, settings=settings_of(tmp_path, lock_timeout_s=0))
    store = BlobStore.open(tmp_path / "root")
    store.prepare()

    with store.lock("tree-" + inventory.tree_id(f"models/{KEY}/fp16"), doing="keeping it"):
        with pytest.raises(LockTimeoutError) as caught:
            models.ensure("test-model", "fp16")

    assert caught.value.code == "LOCK_TIMEOUT"
    assert caught.value.details["holder"]["pid"] == os.getpid()
    assert tree_of(models.ensure("test-model", "fp16")) == FILES


def test_progress_rises_to_the_size_of_all_files(tmp_path: Path):
    """Progress never falls and ends with all bytes done of all bytes (B21)."""
    reported: list[tuple[int, int]] = []
    models, _ = world(tmp_path)

    models.ensure("test-model", "fp16", progress_callback=lambda done, total: reported.append((done, total)))

    assert reported[-1] == (1100, 1100)
    assert reported == sorted(reported) and {total for _, total in reported} == {1100}


def test_success_leaves_nothing_of_its_work(tmp_path: Path):
    """After success there is no partial, no staging folder and no temporary name (B22)."""
    models, _ = world(tmp_path)

    models.ensure("test-model", "fp16")
    models.ensure("test-model", "fp32", force_redownload=True)

    assert leftovers(tmp_path / "root") == []
    assert_sound(tmp_path / "root")


def test_failure_leaves_nothing_of_small_files(tmp_path: Path):
    """A failed download of files without a finished piece leaves nothing at all (B23)."""
    models, source = world(tmp_path)
    source.broken = "mock download failure"

    with pytest.raises(SourceUnavailableError):
        models.ensure("test-model", "fp16")

    assert leftovers(tmp_path / "root") == []
    assert blobs_of(tmp_path / "root") == {}
    assert not models.local_path("test-model", "fp16").exists()


def test_failure_leaves_only_what_can_be_resumed(tmp_path: Path):
    """A download that fails after a finished piece leaves that piece alone, and the next one continues there (B23)."""
    weights = b"x" * (10 * MIB)
    digest = Digest.of(weights)
    memory = MemorySource({MODEL: weights})
    cut = FaultySource(memory, cuts=[9 * MIB] + [0] * 9)
    lock = locked(KEY, {"fp16": {"model.bin": weights}}, [FIRST])

    with pytest.raises(SourceUnavailableError):
        ensurer_of(tmp_path, lock, sources={"mock": cut}).ensure("test-model")

    assert leftovers(tmp_path / "root") == [f"partial/{digest.hex}", f"partial/{digest.hex}.pieces"]
    assert blobs_of(tmp_path / "root") == {}
    memory.ranges.clear()
    models = ensurer_of(tmp_path, lock, sources={"mock": memory})
    assert models.estimate_download_size("test-model") == 2 * MIB
    assert tree_of(models.ensure("test-model")) == {"model.bin": weights}
    assert memory.ranges == [(MODEL, 8 * MIB, 10 * MIB)]
    assert leftovers(tmp_path / "root") == []


# ---- sources that failed lately


def test_a_source_that_failed_lately_is_passed_over(tmp_path: Path):
    """A source that failed is asked last: the next download asks only the one that works (B24)."""
    models, failing, working = two_sources(tmp_path)
    first = models.ensure("test-model", "fp16")
    assert failing.calls == 1 and FIRST in models.failed_sources
    failing.forget()
    working.forget()

    second = models.ensure("test-model", "fp16", force_redownload=True)

    assert first == second and tree_of(second) == FILES
    assert failing.calls == 0
    assert working.asked == {f"{SECOND}/fp16/model.bin": 1, f"{SECOND}/fp16/config.json": 1}


def test_a_failure_is_forgotten_after_its_time(tmp_path: Path):
    """When a failure's time is over the source is asked first again (B25)."""
    clock = Clock()
    models, failing, working = two_sources(tmp_path, failures=FailureTable(clock=clock))
    models.failures.ttl_s = 0.1
    models.ensure("test-model", "fp16")
    assert failing.calls == 1
    failing.forget()
    working.forget()
    clock.now += 0.2

    path = models.ensure("test-model", "fp16", force_redownload=True)

    assert tree_of(path) == FILES
    assert failing.calls == 1
    assert working.asked == {f"{SECOND}/fp16/model.bin": 1, f"{SECOND}/fp16/config.json": 1}


def test_within_its_time_a_failure_is_remembered(tmp_path: Path):
    """A moment before a failure's time is over the source is still passed over (B25)."""
    clock = Clock()
    models, failing, _ = two_sources(tmp_path, failures=FailureTable(clock=clock))
    models.failures.ttl_s = 0.1
    models.ensure("test-model", "fp16")
    failing.forget()
    clock.now += 0.05

    models.ensure("test-model", "fp16", force_redownload=True)

    assert failing.calls == 0


def test_success_clears_a_failure(tmp_path: Path):
    """A source that failed is on record, is asked at once where no other is left, and is cleared by success (B26)."""
    models, source = world(tmp_path)
    source.broken = "mock download failure"
    with pytest.raises(SourceUnavailableError):
        models.ensure("test-model", "fp16")
    assert models.failed_sources[FIRST].what == "mock download failure"
    assert models.failed_sources[FIRST].code == "SOURCE_UNAVAILABLE"
    source.broken = ""

    path = models.ensure("test-model", "fp16", force_redownload=True)

    assert tree_of(path) == FILES
    assert FIRST not in models.failed_sources


def test_expired_failures_are_swept_out_and_fresh_ones_kept():
    """Of two failures the one that is too old goes and the fresh one stays (B27)."""
    clock = Clock()
    failures = FailureTable(ttl_s=0.1, clock=clock)
    failures.note("mock://test-model", "SOURCE_UNAVAILABLE", "old")
    clock.now += 0.2
    failures.note("mock://other-model", "SOURCE_UNAVAILABLE", "fresh")

    failures.expire()

    assert list(failures.active()) == ["mock://other-model"]
    assert "mock://test-model" not in failures and "mock://other-model" in failures


# ---- names


def test_an_unknown_model_is_refused_before_anything_is_touched(tmp_path: Path):
    """An unknown id is MODEL_NOT_FOUND with the ids there are, and no source is asked (B31)."""
    models, source = world(tmp_path)

    with pytest.raises(ModelNotFoundError, match="invalid-model") as caught:
        models.ensure("invalid-model")

    assert caught.value.code == "MODEL_NOT_FOUND"
    assert caught.value.details["available_models"] == [KEY]
    assert KEY in str(caught.value)
    assert source.calls == 0 and not (tmp_path / "root").exists()


def test_ensure_fetches_the_variant_that_was_named(tmp_path: Path):
    """The named variant is downloaded, not the default one (B32)."""
    models, source = world(tmp_path)

    path = models.ensure("test-model", variant="fp32")

    assert path == models.local_path("test-model", "fp32") != models.local_path("test-model")
    assert tree_of(path) == FP32
    assert source.asked == {f"{FIRST}/fp32/model.bin": 1, CONFIG: 1}
    assert not models.local_path("test-model", "fp16").exists()


def test_status_is_of_the_variant_that_was_named(tmp_path: Path):
    """The named variant is not present although the default one is complete (B33)."""
    models, _ = world(tmp_path)
    models.ensure("test-model")

    status = models.status("test-model", variant="fp32")

    assert (status.variant, status.state) == ("fp32", ModelState.NOT_PRESENT)
    assert status.bytes_needed == 2000, "the config is in the store already"
    assert models.status("test-model", variant="fp16").state is ModelState.COMPLETE


def test_verification_is_of_the_variant_that_was_named(tmp_path: Path):
    """The named variant does not verify although the default one would (B34)."""
    models, _ = world(tmp_path)
    models.ensure("test-model")

    report = models.verify_integrity("test-model", variant="fp32")

    assert not report.success
    assert report.missing_files == ("config.json", "model.bin")
    assert models.verify_integrity("test-model", variant="fp16").success
