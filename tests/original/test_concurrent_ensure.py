"""Several callers want the same model at the same moment: the bytes are fetched once, and all callers get them."""

from __future__ import annotations

import threading
from collections import Counter
from pathlib import Path

import pytest
from builders import PATIENCE_S, Cli, assert_sound, ensurer_of, leftovers, lock_of, tree_of, write_lock
from fixtures import EventLog, WatchedSource, at_once, hear, locked, opened, put, served, talking
from origin import Origin, gate_of

from modelstow import ModelState
from modelstow.backends import Source
from modelstow.backends.conformance import SourceContract
from modelstow.backends.memory import MemorySource

pytestmark = pytest.mark.slow

MIB = 1 << 20
CONFIG = b"x" * 1024
FP16 = {"config.json": CONFIG, "model.bin": b"x" * (10 * MIB)}
BF16 = {"config.json": CONFIG, "model.bin": b"y" * (10 * MIB)}
BASE = "mock://test.com/test-model"


def world(folder: Path, variants=None, *, gate: threading.Event | None = None, **more):
    """An ensurer of test-model and the source that serves it."""
    variants = variants or {"fp16": FP16, "bf16": BF16}
    source = WatchedSource(MemorySource(served(variants, BASE)), gate=gate)
    lock = locked("test-model@1.0.0", variants, [BASE])
    return ensurer_of(folder, lock, sources={"mock": source}, **more), source


def once(*places: str) -> Counter[str]:
    """Each of these was asked for exactly once, and nothing else."""
    return Counter({f"{BASE}/{place}": 1 for place in places})


def test_two_threads_share_one_download(tmp_path: Path):
    """Two threads that ask at once share one download and get the same path (A1)."""
    log, gate = EventLog(), threading.Event()
    models, source = world(tmp_path, gate=gate, events=log)

    with at_once(*[lambda: models.ensure("test-model", "fp16")] * 2, gate=gate) as asked:
        assert source.wait_for(f"{BASE}/fp16/model.bin") and log.waiting.wait(PATIENCE_S), "one downloads, one waits"
        gate.set()
        first, second = [future.result(PATIENCE_S) for future in asked]

    assert first == second == models.local_path("test-model", "fp16")
    assert tree_of(first) == FP16
    assert {path.name: path.stat().st_size for path in first.iterdir()} == {"config.json": 1024, "model.bin": 10_485_760}
    assert source.asked == once("fp16/config.json", "fp16/model.bin")
    assert leftovers(tmp_path / "root") == []


def test_two_processes_share_one_download(cli: Cli):
    """Two processes that ask at once share one download and print the same path (A1)."""
    with Origin({f"m/{path}": data for path, data in FP16.items()}) as origin:
        write_lock(cli.folder, lock_of({"test-model@1.0.0": {"fp16": FP16}}, [f"{origin.url}/m"]))
        gate = gate_of(origin, "m/model.bin", after=MIB)
        command = ("ensure", "test-model@1.0.0#fp16", "--progress", "json")

        with talking(cli.start(*command), cli.start(*command)) as (heard, (one, other)):
            assert origin.reached.wait(PATIENCE_S)
            hear(heard, lambda row: row["event"] == "Waiting")
            gate.set()
            first, second = one.end(), other.end()

        assert (first.code, second.code) == (0, 0), first.err + second.err
        assert first.out == second.out == f"{cli.root}/models/test-model@1.0.0/fp16\n"
        assert tree_of(Path(first.out.strip())) == FP16
        assert Counter(seen.path for seen in origin.gets()) == {"m/config.json": 1, "m/model.bin": 1}
    assert leftovers(cli.root) == []
    assert_sound(cli.root)


def test_two_variants_are_downloaded_side_by_side(tmp_path: Path):
    """Two variants asked for at once are two trees and two downloads of weights, which run at the same time (A2)."""
    gate = threading.Event()
    models, source = world(tmp_path, gate=gate)

    with at_once(*[lambda v=v: models.ensure("test-model", v) for v in ("fp16", "bf16")], gate=gate) as asked:
        assert source.wait_for(f"{BASE}/fp16/model.bin", f"{BASE}/bf16/model.bin"), "neither waits for the other"
        gate.set()
        fp16, bf16 = [future.result(PATIENCE_S) for future in asked]

    assert fp16 != bf16
    assert tree_of(fp16) == FP16 and tree_of(bf16) == BF16
    assert source.asked == once("fp16/config.json", "fp16/model.bin", "bf16/model.bin"), "the shared file comes once"


def test_two_variants_with_equal_files_are_two_folders_and_one_download(tmp_path: Path):
    """Two variants of the same files are in different folders, and their bytes are still fetched once (A2)."""
    models, source = world(tmp_path, {"fp16": FP16, "bf16": FP16})

    with at_once(*[lambda v=v: models.ensure("test-model", v) for v in ("fp16", "bf16")]) as asked:
        fp16, bf16 = [future.result(PATIENCE_S) for future in asked]

    assert fp16 != bf16
    assert tree_of(fp16) == tree_of(bf16) == FP16
    assert source.asked == once("fp16/config.json", "fp16/model.bin")


def test_a_model_that_is_in_place_already_is_not_downloaded(tmp_path: Path):
    """Two threads that ask for a model whose files are in place already get it without any download (A3)."""
    models, source = world(tmp_path)
    put(models.local_path("test-model", "fp16"), FP16)

    with at_once(*[lambda: models.ensure("test-model", "fp16")] * 2) as asked:
        first, second = [future.result(PATIENCE_S) for future in asked]

    assert first == second == models.local_path("test-model", "fp16")
    assert source.calls == 0
    assert tree_of(first) == FP16
    assert models.status("test-model", "fp16").state is ModelState.COMPLETE


def test_two_forced_downloads_at_once_are_one(tmp_path: Path):
    """Two threads that force a download at once share one (A4)."""
    log, gate = EventLog(), threading.Event()
    models, source = world(tmp_path, gate=gate, events=log)

    with at_once(*[lambda: models.ensure("test-model", "fp16", force_redownload=True)] * 2, gate=gate) as asked:
        assert source.wait_for(f"{BASE}/fp16/model.bin", f"{BASE}/fp16/config.json") and log.waiting.wait(PATIENCE_S)
        gate.set()
        first, second = [future.result(PATIENCE_S) for future in asked]

    assert first == second
    assert source.asked == once("fp16/config.json", "fp16/model.bin")
    assert tree_of(first) == FP16
    assert leftovers(tmp_path / "root") == []


def test_a_forced_download_of_what_was_there_is_shared_too(tmp_path: Path):
    """Two threads that force a download of a complete model fetch it once more, not twice (A4)."""
    log, gate = EventLog(), opened()
    models, source = world(tmp_path, gate=gate, events=log)
    models.ensure("test-model", "fp16")
    source.forget()
    gate.clear()

    with at_once(*[lambda: models.ensure("test-model", "fp16", force_redownload=True)] * 2, gate=gate) as asked:
        assert source.wait_for(f"{BASE}/fp16/model.bin", f"{BASE}/fp16/config.json") and log.waiting.wait(PATIENCE_S)
        assert tree_of(models.local_path("test-model", "fp16")) == FP16, "the good tree stays meanwhile"
        gate.set()
        first, second = [future.result(PATIENCE_S) for future in asked]

    assert first == second
    assert source.asked == once("fp16/config.json", "fp16/model.bin")
    assert tree_of(first) == FP16


def test_asking_again_uses_what_is_there(tmp_path: Path):
    """The second of two calls downloads nothing and returns the same path (A5)."""
    models, source = world(tmp_path)
    first = models.ensure("test-model", "fp16")
    calls = source.calls

    second = models.ensure("test-model", "fp16")

    assert first == second
    assert calls == source.calls == 2, "one download: each of the two files was asked for once"
    status = models.status("test-model", "fp16")
    assert (status.state, status.bytes_needed, status.missing_files) == (ModelState.COMPLETE, 0, ())


class TestWatchedSource(SourceContract):
    """The source that these tests hold up is a source like any other."""

    def folder(self) -> str:
        return "mem://host/models"

    def make(self) -> Source:
        return WatchedSource(MemorySource({f"mem://host/models/{name}": data for name, data in self.OBJECTS.items()}))
