"""Whole workflows: from a lockfile and sources to a model that a pipeline loads, through failures and back."""

from __future__ import annotations

import os
import threading
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from builders import PATIENCE_S, Cli, assert_sound, blobs_of, ensurer_of, leftovers, lock_of, memory, tree_of, write_lock
from fixtures import (
    EventLog,
    WatchedSource,
    at_once,
    hear,
    locked,
    served,
    snapshot,
    talking,
)
from origin import Origin, gate_of

from modelstow import ModelEnsurer, ModelState, NoSpaceError
from modelstow.backends.faulty import FaultySource
from modelstow.backends.memory import MemorySource
from modelstow.cas import Digest, inventory
from modelstow.reconcile.events.events import BlobFailed, BlobFetched, FetchStarted, SourceFailed
from modelstow.reconcile.events.recorder import Recorder
from modelstow.reconcile.retention.collector import EvictionTargets
from modelstow.reconcile.settings import Settings

pytestmark = pytest.mark.slow

MIB = 1 << 20
KEY = "test-model@1.0.0"
INDEX, UNET = "model_index.json", "unet/diffusion_pytorch_model.safetensors"
FP16 = {INDEX: b'{"test": "data"}'.ljust(1024), UNET: b"x" * (10 * MIB)}
BF16 = {INDEX: FP16[INDEX], UNET: b"y" * (9 * MIB)}
VARIANTS = {"fp16": FP16, "bf16": BF16}
TOTAL = 1024 + 10 * MIB
HF, S3 = "hf://test-org/test-model", "s3://test-bucket/test-model@1.0.0"
DAY_S = 86_400


def world(folder: Path, **more) -> tuple[ModelEnsurer, WatchedSource]:
    """An ensurer of test-model, and the hub that serves it."""
    hub = WatchedSource(MemorySource(served(VARIANTS, HF)))
    return ensurer_of(folder, locked(KEY, VARIANTS, [HF]), sources={"hf": hub}, **more), hub


def over_http(cli: Cli, origin: Origin, files=FP16) -> None:
    """Lock test-model for the command line; *origin* serves its files."""
    origin.objects.update({f"m/{path}": data for path, data in files.items()})
    write_lock(cli.folder, lock_of({KEY: {"fp16": files}}, [f"{origin.url}/m"]))


def test_a_model_is_downloaded_from_nothing_to_complete(tmp_path: Path):
    """A model of two files, one in a folder of its own, is fetched and COMPLETE (C1)."""
    models, hub = world(tmp_path)

    path = models.ensure(KEY, "fp16")

    assert tree_of(path) == FP16
    assert (path / INDEX).is_file() and (path / UNET).is_file()
    assert models.status(KEY, "fp16").state == "COMPLETE"
    assert hub.asked == {f"{HF}/fp16/{INDEX}": 1, f"{HF}/fp16/{UNET}": 1}
    assert leftovers(tmp_path / "root") == []
    assert_sound(tmp_path / "root")


def test_processes_that_want_one_model_at_once_download_it_once(cli: Cli):
    """Two processes that want one model get the same path from exactly one download (C2)."""
    with Origin() as origin:
        over_http(cli, origin)
        gate = gate_of(origin, f"m/{UNET}", after=9 * MIB)
        command = ("ensure", f"{KEY}#fp16", "--json", "--progress", "json")

        with talking(cli.start(*command), cli.start(*command)) as (heard, (one, other)):
            assert origin.reached.wait(PATIENCE_S)
            hear(heard, lambda row: row["event"] == "Waiting")
            gate.set()
            first, second = one.end(), other.end()

        assert (first.code, second.code) == (0, 0), first.err + second.err
        paths = {tree["path"] for ran in (first, second) for tree in ran.json["trees"]}
        assert paths == {str(cli.root / "models" / KEY / "fp16")}
        assert Counter(seen.path for seen in origin.gets()) == {f"m/{INDEX}": 1, f"m/{UNET}": 1}
        assert origin.sent() == TOTAL
        assert first.json["summary"]["fetched_bytes"] + second.json["summary"]["fetched_bytes"] == TOTAL
    assert tree_of(cli.root / "models" / KEY / "fp16") == FP16
    assert leftovers(cli.root) == []


def test_threads_that_want_one_model_at_once_download_it_once(tmp_path: Path):
    """Two threads that want one model get the same path from exactly one download (C2)."""
    log, gate = EventLog(), threading.Event()
    models, hub = world(tmp_path, events=log)
    hub.gate = gate

    with at_once(*[lambda: models.ensure(KEY, "fp16")] * 2, gate=gate) as asked:
        assert hub.wait_for(f"{HF}/fp16/{UNET}") and log.waiting.wait(PATIENCE_S)
        gate.set()
        first, second = [future.result(PATIENCE_S) for future in asked]

    assert first == second and tree_of(first) == FP16
    assert hub.asked == {f"{HF}/fp16/{INDEX}": 1, f"{HF}/fp16/{UNET}": 1}


def test_the_hub_takes_over_from_a_bucket_that_fails(tmp_path: Path):
    """The bucket is asked first; when its connection fails the hub gives the model (C3)."""
    bucket = WatchedSource(MemorySource(served(VARIANTS, S3)), broken="S3 connection failed")
    hub = WatchedSource(MemorySource(served(VARIANTS, HF)))
    models = ensurer_of(tmp_path, locked(KEY, VARIANTS, [S3, HF]), sources={"s3": bucket, "hf": hub})

    path = models.ensure(KEY, "fp16")

    assert tree_of(path) == FP16
    assert bucket.calls >= 1
    assert set(bucket.asked) <= {f"{S3}/fp16/{INDEX}", f"{S3}/fp16/{UNET}"}
    assert hub.asked == {f"{HF}/fp16/{INDEX}": 1, f"{HF}/fp16/{UNET}": 1}
    assert "S3 connection failed" in models.failed_sources["s3://test-bucket"].what


def test_a_full_disk_is_reported_before_anything_is_downloaded(tmp_path: Path):
    """With 1024 bytes free, ensure says NO_SPACE with the figures and names `modelstow gc`, without a request (C4)."""
    models, hub = world(tmp_path, free_bytes=lambda: 1024)

    with pytest.raises(NoSpaceError) as caught:
        models.ensure(KEY, "fp16")

    assert caught.value.code == "NO_SPACE"
    assert caught.value.details["bytes_needed"] == TOTAL
    assert caught.value.details["bytes_available"] == 1024
    assert "modelstow gc" in caught.value.hint
    assert hub.calls == 0
    assert leftovers(tmp_path / "root") == []


def test_over_its_quota_ensure_evicts_what_was_used_least_recently(tmp_path: Path):
    """Where a limit is set and would be exceeded, the least recently used model makes room (C4)."""
    settings = Settings(root=tmp_path / "root", lockfile=tmp_path / "models.lock", max_size=12 * MIB)
    models, hub = world(tmp_path, settings=settings)
    old = models.ensure(KEY, "bf16")
    used_long_ago(tmp_path / "root", f"{KEY}/bf16", DAY_S)

    new = models.ensure(KEY, "fp16")

    assert tree_of(new) == FP16
    assert not old.exists() and models.status(KEY, "bf16").state is ModelState.NOT_PRESENT
    assert blobs_of(tmp_path / "root").keys() == {Digest.of(data).hex for data in FP16.values()}
    assert hub.asked[f"{HF}/fp16/{UNET}"] == 1


def test_wrong_bytes_are_downloaded_once_more_automatically(tmp_path: Path):
    """Bytes that arrive wrong the first time and right the second cost exactly two downloads of that file (C5)."""
    flipped: list[str] = []

    def corrupt(locator: str, offset: int, data: memoryview) -> None:
        if locator.endswith(UNET) and offset == 0 and not flipped:
            flipped.append(locator)
            data[0] ^= 1

    hub = FaultySource(MemorySource(served(VARIANTS, HF)), corrupt=corrupt)
    models = ensurer_of(tmp_path, locked(KEY, VARIANTS, [HF]), sources={"hf": hub})

    path = models.ensure(KEY, "fp16")

    assert flipped and tree_of(path) == FP16
    assert Counter(locator for locator, _ in hub.opened_at) == {f"{HF}/fp16/{UNET}": 2, f"{HF}/fp16/{INDEX}": 1}
    assert leftovers(tmp_path / "root") == []
    assert_sound(tmp_path / "root")


def test_another_source_takes_over_from_one_that_sends_wrong_bytes(tmp_path: Path):
    """Where another source has the file, it is asked at once, and the corrupt sender goes on record (C5)."""
    wrong = served(VARIANTS, S3) | {f"{S3}/fp16/{UNET}": b"z" * (10 * MIB)}
    bucket, hub = WatchedSource(MemorySource(wrong)), WatchedSource(MemorySource(served(VARIANTS, HF)))
    models = ensurer_of(tmp_path, locked(KEY, VARIANTS, [S3, HF]), sources={"s3": bucket, "hf": hub})

    path = models.ensure(KEY, "fp16")

    assert tree_of(path) == FP16
    assert (bucket.asked[f"{S3}/fp16/{UNET}"], hub.asked[f"{HF}/fp16/{UNET}"]) == (1, 1)
    assert models.failed_sources[f"{S3}/fp16/{UNET}"].code == "CHECKSUM_FAIL"
    assert_sound(tmp_path / "root")


def test_a_killed_download_is_continued_not_repeated(cli: Cli):
    """After kill -9 the next run keeps the finished file and the finished piece and fetches only the rest (C6)."""
    unet, index = Digest.of(FP16[UNET]), Digest.of(FP16[INDEX])
    arrived = Counter[str]()

    def first_piece_is_there(row) -> bool:
        if row["event"] == "BytesArrived":
            arrived[row["digest"]] += row["count"]
        return arrived[unet] > 8 * MIB

    with Origin() as origin:
        over_http(cli, origin)
        gate = gate_of(origin, f"m/{UNET}", after=9 * MIB)
        with talking(cli.start("ensure", f"{KEY}#fp16", "--progress", "json")) as (heard, (run,)):
            hear(heard, first_piece_is_there, lambda row: row["event"] == "BlobFetched" and row["digest"] == index)
            run.process.kill()
            assert run.end().code == -9
        gate.set()
        assert leftovers(cli.root) == [f"partial/{unet.hex}", f"partial/{unet.hex}.pieces"]
        origin.forget()

        again = cli.ok("ensure", f"{KEY}#fp16", "--json").json

        assert [(seen.path, seen.range) for seen in origin.gets()] == [(f"m/{UNET}", f"bytes={8 * MIB}-{10 * MIB - 1}")]
        assert (again["summary"]["fetched_bytes"], again["summary"]["resumed_bytes"]) == (2 * MIB, 8 * MIB)
    assert tree_of(Path(again["trees"][0]["path"])) == FP16
    assert leftovers(cli.root) == []
    assert_sound(cli.root)


def test_health_is_checked_without_a_download(tmp_path: Path):
    """The state of an absent model is reported with the bytes it needs, without a request and without a write (C7)."""
    models, hub = world(tmp_path)

    status = models.status(KEY)

    assert status.state == "NOT_PRESENT"
    assert status.bytes_needed == TOTAL
    assert hub.calls == 0 and not (tmp_path / "root").exists()


def test_health_lists_every_model(cli: Cli):
    """The command line reports the state of every variant of every model, and reads no file to do so (C7)."""
    with Origin() as origin:
        over_http(cli, origin)
        cli.ok("ensure", KEY)
        more = {f"other-{n}@1.0.0": {"fp16": {"model.bin": b"z" * n}} for n in range(1, 30)}
        write_lock(cli.folder, lock_of({KEY: {"fp16": FP16}, **more}, [f"{origin.url}/m"]))
        origin.forget()
        before = snapshot(cli.root)

        answer = cli.ok("status", "--json").json

        assert {f"{row['model']}#{row['variant']}": row["state"] for row in answer["models"]} == {
            f"{KEY}#fp16": "COMPLETE",
            **{f"{key}#fp16": "NOT_PRESENT" for key in more},
        }
        assert sum(row["bytes_needed"] for row in answer["models"]) == sum(range(1, 30))
        assert origin.requests == [] and snapshot(cli.root) == before


def old_and_new(folder: Path) -> tuple[ModelEnsurer, Path, Path]:
    """Two models of 8000 bytes, used a day ago and now, and an ensurer whose lockfile names neither."""
    files = {"old-model@1.0.0": {"model.bin": b"o" * 8000}, "new-model@1.0.0": {"model.bin": b"n" * 8000}}
    paths = []
    for key, content in files.items():
        models = ensurer_of(folder, lock_of({key: {"fp16": content}}), memory(content))
        paths.append(models.ensure(key))
    used_long_ago(folder / "root", "old-model@1.0.0/fp16", DAY_S)
    return world(folder)[0], paths[0], paths[1]


def test_over_the_limit_the_older_model_is_collected(tmp_path: Path):
    """Garbage collection to a limit evicts the model used a day ago and keeps the one used now (C8)."""
    models, old, new = old_and_new(tmp_path)

    collected = models.collect_garbage(goals=EvictionTargets(max_size=12_000))

    assert collected.reclaimed_bytes == 8000
    assert collected.trees == [str(old)]
    assert not old.exists()
    assert tree_of(new) == {"model.bin": b"n" * 8000}
    assert_sound(tmp_path / "root")


def test_a_dry_run_reports_what_would_go_and_removes_nothing(tmp_path: Path):
    """A dry run names the same model and the same bytes, and leaves everything as it is (C8)."""
    models, old, new = old_and_new(tmp_path)
    before = snapshot(tmp_path / "root")

    collected = models.collect_garbage(dry_run=True, goals=EvictionTargets(max_size=12_000))

    assert (collected.trees, collected.reclaimed_bytes) == ([str(old)], 8000)
    assert old.exists() and new.exists()
    assert snapshot(tmp_path / "root") == before


def test_a_model_in_use_is_not_collected(tmp_path: Path):
    """A model with a lease stays although it was used least recently; the other one goes (C8)."""
    models, old, new = old_and_new(tmp_path)
    mine = ensurer_of(tmp_path, lock_of({"old-model@1.0.0": {"fp16": {"model.bin": b"o" * 8000}}}), MemorySource({}))

    with mine.lease("old-model") as path:
        used_long_ago(tmp_path / "root", "old-model@1.0.0/fp16", DAY_S)
        models.collect_garbage(goals=EvictionTargets(max_size=12_000))
        kept = tree_of(path)

    assert path == old and kept == {"model.bin": b"o" * 8000}
    assert not new.exists()


def test_a_pinned_model_is_not_collected(cli: Cli):
    """A pinned model stays however old it is, and goes when it is unpinned (C8)."""
    models, old, new = old_and_new(cli.folder)
    write_lock(cli.folder, lock_of({"old-model@1.0.0": {"fp16": {"model.bin": b"o" * 8000}}}))
    cli.ok("pin", "old-model")

    models.collect_garbage(goals=EvictionTargets(max_size=12_000))
    kept = (old.exists(), new.exists())
    cli.ok("unpin", "old-model")
    models.collect_garbage(goals=EvictionTargets(max_size=0))

    assert kept == (True, False)
    assert not old.exists() and blobs_of(cli.root) == {}


def test_the_command_line_and_python_see_one_model(cli: Cli):
    """What the command line fetched Python finds complete, and neither downloads it again (C9)."""
    with Origin() as origin:
        over_http(cli, origin)

        fetched = cli.ok("ensure", KEY)
        asked = len(origin.gets())
        models = ModelEnsurer.open(root=cli.root, lockfile=cli.folder / "models.lock")
        status = models.status(KEY)
        again = cli.ok("ensure", f"{KEY}#fp16", "--json")

        path = Path(fetched.out.strip())
        assert path.is_dir() and tree_of(path) == FP16
        assert (status.state, status.local_path) == (ModelState.COMPLETE, path)
        assert models.ensure(KEY, "fp16") == path
        assert again.json["ok"] is True and again.json["summary"]["fetched_bytes"] == 0
        assert [(tree["path"], tree["changed"]) for tree in again.json["trees"]] == [(str(path), False)]
        assert (asked, len(origin.gets())) == (2, 2)


def test_what_python_fetched_the_command_line_finds_complete(cli: Cli):
    """What Python fetched the command line finds complete, and downloads nothing (C9)."""
    with Origin() as origin:
        over_http(cli, origin)
        path = ModelEnsurer.open(root=cli.root, lockfile=cli.folder / "models.lock").ensure(KEY)
        origin.forget()

        status = cli.ok("status", KEY, "--json", "--check")
        again = cli.ok("ensure", KEY)

        assert [(row["state"], row["path"]) for row in status.json["models"]] == [("COMPLETE", str(path))]
        assert again.out == f"{path}\n"
        assert origin.requests == []


def test_a_manifest_with_upper_case_digests_is_locked_and_ensured(cli: Cli):
    """From a written manifest, upper-case digests and all, the command line makes a lockfile and a ready model (C9)."""
    digests = {path: Digest.of(data).hex.upper() for path, data in FP16.items()}
    rows = [f'{{ path = "{p}", size = {len(data)}, sha256 = "{digests[p]}" }}' for p, data in FP16.items()]
    with Origin({f"m/{path}": data for path, data in FP16.items()}) as origin:
        (cli.folder / "models.toml").write_text(
            f'schema = 1\n[models."test-model"]\nversion = "1.0.0"\nsources = ["{origin.url}/m/"]\n'
            f'[models."test-model".variants.fp16]\nfiles = [{", ".join(rows)}]\n'
        )

        locking = cli.ok("lock", "--json")
        path = Path(cli.ok("ensure", "--all").out.strip())

        assert (locking.json["models"], locking.json["files"]) == (1, 2)
        assert tree_of(path) == FP16
        assert Counter(seen.path for seen in origin.gets()) == {f"m/{INDEX}": 1, f"m/{UNET}": 1}


def test_a_failing_command_gives_one_json_document_and_its_exit_code(cli: Cli):
    """When no source has the model, standard output is one JSON document with the error, and the exit code is 5 (C9)."""
    with Origin() as origin:
        over_http(cli, origin)
        origin.objects.pop(f"m/{INDEX}")

        ran = cli.run("ensure", KEY, "--json")

        assert ran.code == 5
        assert (ran.json["ok"], ran.json["error"]["code"]) == (False, "INCOMPLETE_DOWNLOAD")
        assert ran.json["error"]["details"]["missing_files"] == [INDEX]
        assert ran.json["error"]["hint"]


def test_a_pipeline_gets_an_absolute_path_to_load_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A pipeline that names no variant and a relative root gets an absolute path with every file in it (C10)."""
    world(tmp_path)
    monkeypatch.chdir(tmp_path)
    hub = MemorySource(served(VARIANTS, HF))
    models = ModelEnsurer.open(root="root", lockfile="models.lock", factories={"hf": lambda: hub})

    path = models.ensure("test-model")

    assert path.is_absolute() and path.is_dir()
    assert path == models.local_path(KEY, "fp16") == models.ensure(KEY, "fp16"), "the default variant is the same tree"
    assert (path / INDEX).read_bytes() == FP16[INDEX]
    assert (path / UNET).read_bytes() == FP16[UNET]


def test_a_changed_lockfile_is_not_satisfied_by_the_old_model(tmp_path: Path):
    """When the lockfile names other bytes the old tree is no longer complete, and only what changed is fetched (C10)."""
    world(tmp_path)[0].ensure(KEY, "fp16")
    changed = {"fp16": FP16 | {INDEX: b'{"test": "newer"}'}}
    hub = WatchedSource(MemorySource(served(changed, HF)))
    models = ensurer_of(tmp_path, locked(KEY, changed, [HF]), sources={"hf": hub})

    before = models.status(KEY)
    path = models.ensure(KEY)

    assert before.state is not ModelState.COMPLETE
    assert before.bytes_needed == len(changed["fp16"][INDEX])
    assert tree_of(path) == changed["fp16"]
    assert hub.asked == {f"{HF}/fp16/{INDEX}": 1}


def test_a_model_without_its_optional_part_is_complete(tmp_path: Path):
    """An optional component that was not chosen is neither fetched nor missed (C10)."""
    lock = locked(KEY, {"fp16": FP16}, [HF])
    model = lock.models[KEY]
    fp16 = replace(model.variants["fp16"], components={"unet": (UNET,)}, optional=("unet",))
    lock = replace(lock, models={KEY: replace(model, variants={"fp16": fp16})})
    hub = WatchedSource(MemorySource(served(VARIANTS, HF)))
    models = ensurer_of(tmp_path, lock, sources={"hf": hub})

    path = models.ensure(KEY)

    assert tree_of(path) == {INDEX: FP16[INDEX]}
    assert hub.asked == {f"{HF}/fp16/{INDEX}": 1}
    assert models.status(KEY).state is ModelState.COMPLETE


def test_a_download_can_be_counted_and_timed(tmp_path: Path):
    """The events of a download fold into what was started and completed, its bytes and its duration (C11)."""
    moments = iter([100.0, 107.5])
    log = EventLog()
    recorder = Recorder(clock=lambda: next(moments))
    models, _ = world(tmp_path, events=log)

    with models.events.subscribe(recorder):
        path = models.ensure(KEY, "fp16")

    assert tree_of(path) == FP16
    started = [event for event in log.events if isinstance(event, FetchStarted)]
    completed = [event for event in log.events if isinstance(event, BlobFetched)]
    assert Counter(event.name for event in started) == {INDEX: 1, UNET: 1}
    assert sum(event.size for event in started) == TOTAL
    assert {event.digest for event in completed} == {Digest.of(data) for data in FP16.values()}
    report = recorder.report()
    assert (report.fetched_blobs, report.fetched_bytes, report.resumed_bytes) == (2, TOTAL, 0)
    assert [(event.model, event.variant, event.path) for event in report.published] == [(KEY, "fp16", path)]
    assert report.seconds == 7.5


def test_a_failed_download_is_counted_too(tmp_path: Path):
    """A failed download shows as started and failed, not as completed, and each refusal names its source (C11)."""
    log = EventLog()
    models, hub = world(tmp_path, events=log)
    hub.broken = "no route to host"

    outcome = models.ensure_all([f"{KEY}#fp16"])

    counts = Counter(type(event) for event in log.events)
    assert outcome.error is not None and outcome.error.code == "SOURCE_UNAVAILABLE"
    assert (counts[FetchStarted], counts[BlobFailed], counts[BlobFetched]) == (2, 2, 0)
    refusals = [event for event in log.events if isinstance(event, SourceFailed)]
    assert len(refusals) == hub.calls
    assert {event.locator for event in refusals} == set(hub.asked)
    assert (outcome.report.fetched_blobs, outcome.report.fetched_bytes) == (0, 0)
    assert outcome.report.seconds >= 0


def used_long_ago(root: Path, tree: str, seconds: float) -> None:
    """Set a tree's last use *seconds* into the past."""
    record = root / "state/inventories" / inventory.tree_id(f"models/{tree}")
    then = record.stat().st_mtime - seconds
    os.utime(record, (then, then))
