"""Many at once: processes that want the same, and those that collect garbage while others fetch."""

from __future__ import annotations

import random
import signal
import threading
from pathlib import Path

import pytest
from builders import PATIENCE_S, Cli, assert_sound, ensurer_of, leftovers, lock_of, memory, some_bytes, tree_of, write_lock
from origin import Origin

from modelstow import ModelEnsurer
from modelstow.reconcile.retention.collector import EvictionTargets

pytestmark = pytest.mark.slow

FILES = {f"part-{n}.bin": some_bytes(1_500_000, n) for n in range(4)} | {"config.json": b"{}", "vocab.txt": b"a b"}
SMALL = {"config.json": b"{}", "part-0.bin": FILES["part-0.bin"], "adapter.bin": some_bytes(100_000, 50)}


def test_eight_processes_that_ensure_the_same_fetch_each_blob_once(cli: Cli):
    """One downloads, the others wait and find it done; all print the same path (C8)."""
    with Origin({f"m/{path}": data for path, data in FILES.items()}) as origin:
        write_lock(cli.folder, lock_of({"m@1": {"v": FILES}}, sources=[f"{origin.url}/m"]))
        running = [cli.start("ensure", "m") for _ in range(8)]
        answers = [process.communicate(timeout=PATIENCE_S) for process in running]

        assert [process.returncode for process in running] == [0] * 8, answers
        assert {out for out, _ in answers} == {f"{cli.root}/models/m@1/v\n"}
        assert sorted(seen.path for seen in origin.gets()) == sorted(f"m/{path}" for path in FILES)
    assert tree_of(cli.root / "models/m@1/v") == FILES
    assert leftovers(cli.root) == []


def test_processes_with_overlapping_variants_share_the_fetch_of_what_is_common(cli: Cli):
    """Shared blobs are fetched once, both trees are right (C9)."""
    files = {f"m/{path}": data for path, data in (FILES | SMALL).items()}
    with Origin(files) as origin:
        write_lock(cli.folder, lock_of({"m@1": {"a": FILES, "b": SMALL}}, sources=[f"{origin.url}/m"]))
        running = [cli.start("ensure", f"m#{variant}") for variant in "abab"]
        answers = [process.communicate(timeout=PATIENCE_S) for process in running]

        assert [process.returncode for process in running] == [0] * 4, answers
        paths = [seen.path for seen in origin.gets()]
        assert len(paths) == len(set(paths)) == len(files)
    assert tree_of(cli.root / "models/m@1/a") == FILES and tree_of(cli.root / "models/m@1/b") == SMALL


def test_collecting_while_others_fetch_and_evict_takes_nothing_that_lives(tmp_path: Path):
    """Threads ensure, evict and collect at random; every ensured tree is in place and every blob equals its name (C10)."""
    rng = random.Random(7)
    models = {"m@1": {"a": FILES, "b": SMALL}, "n@1": {"c": {"n.bin": some_bytes(300_000, 60)}}}
    lock, source = lock_of(models), memory(FILES | SMALL | models["n@1"]["c"])
    failures: list[BaseException] = []

    def work(mine: ModelEnsurer, seed: int) -> None:
        turns = random.Random(seed)
        try:
            for _ in range(20):
                chosen = turns.choice(["m#a", "m#b", "n#c"])
                if turns.random() < 0.4:
                    mine.collect_garbage(goals=EvictionTargets(max_size=0) if turns.random() < 0.5 else None)
                else:
                    with mine.lease(chosen) as path:
                        variant = chosen[-1]
                        want = models["n@1" if variant == "c" else "m@1"][variant]
                        assert tree_of(path) == want
        except BaseException as error:
            failures.append(error)

    threads = [
        threading.Thread(target=work, args=(ensurer_of(tmp_path, lock, source), rng.randrange(1000))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)

    assert failures == []
    assert_sound(tmp_path / "root")


def test_random_kills_of_processes_that_share_a_store_leave_it_sound(cli: Cli):
    """Eight rounds of three processes, one of them killed at a random moment; then everything is reached (C13, C19)."""
    rng = random.Random(11)
    print("seed 11")
    with Origin({f"m/{path}": data for path, data in FILES.items()}, rate=20_000_000) as origin:
        write_lock(cli.folder, lock_of({"m@1": {"v": FILES}}, sources=[f"{origin.url}/m"]))
        for _ in range(4):
            running = [cli.start(*command) for command in (("ensure", "m"), ("reconcile",), ("gc",))]
            victim = running[rng.randrange(2)]
            try:
                victim.wait(rng.random() * 0.8)
            except Exception:
                victim.send_signal(signal.SIGKILL)
            for process in running:
                process.communicate(timeout=PATIENCE_S)
            if (cli.root / "models").exists():
                assert_sound(cli.root)
        cli.ok("reconcile")
    assert tree_of(cli.root / "models/m@1/v") == FILES
    assert leftovers(cli.root) == []


def test_repair_and_ensure_in_both_orders_do_not_deadlock(tmp_path: Path):
    """One lock order: two threads that damage, repair and ensure the same blobs come to an end (D10)."""
    lock, source = lock_of({"m@1": {"a": FILES, "b": SMALL}}), memory(FILES | SMALL)
    first = ensurer_of(tmp_path, lock, source)
    first.reconcile()
    failures: list[BaseException] = []

    def damage_and_heal(variant: str, mine: ModelEnsurer) -> None:
        try:
            for _ in range(5):
                victim = mine.local_path("m", variant) / "part-0.bin"
                victim.chmod(0o644)
                with open(victim, "r+b") as file:
                    file.write(b"damage")
                mine.ensure("m", variant)
        except (FileNotFoundError, PermissionError):
            pass  # the other one was just replacing it
        except BaseException as error:
            failures.append(error)

    threads = [
        threading.Thread(target=damage_and_heal, args=(variant, ensurer_of(tmp_path, lock, source))) for variant in "ab"
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
        assert not thread.is_alive(), "two locks were taken in opposite orders"

    assert failures == []
    first.ensure_all(None)
    assert tree_of(first.local_path("m", "a")) == FILES and tree_of(first.local_path("m", "b")) == SMALL
