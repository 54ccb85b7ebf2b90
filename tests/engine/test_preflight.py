"""Room before the first byte: what is shared costs nothing, what is copied counts on the disk that holds the copy."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from builders import Cli, lock_of, some_bytes, tree_of, write_lock

from modelstow.cas import syscalls

FILES = {"a.bin": some_bytes(3_000_000, 1), "b.bin": some_bytes(1_000_000, 2)}


@contextmanager
def disk_of(folder: Path, size: str) -> Iterator[Path]:
    """A file system of its own."""
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"nothing can be mounted here: {mounted.stderr.decode()[:80]}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MB."""
    with disk_of(tmp_path / "small", "2m") as disk:
        yield disk


def states(cli: Cli) -> dict[str, str]:
    return {row["variant"]: row["state"] for row in cli.ok("status", "--json").json["models"]}


def two_variants(cli: Cli, *, pin: str = "") -> None:
    """``a`` and ``b``, each with the file of its name, 3 MB and 1 MB."""
    source = cli.folder / "src"
    source.mkdir(exist_ok=True)
    for name, data in FILES.items():
        (source / name).write_bytes(data)
    manifest = f'schema = 1\n[models.m]\nversion = "1"\nsources = ["src"]\n{pin}\n'
    for name in ("a", "b"):
        manifest += f'[models.m.variants.{name}]\ninclude = ["{name}.bin"]\n'
    (cli.folder / "models.toml").write_text(manifest)
    cli.ok("lock", "--root", str(cli.folder / "elsewhere"))


def summary(cli: Cli, *options: str) -> dict[str, int]:
    return dict(cli.ok("plan", "--json", *options).json["summary"])


def served(cli: Cli) -> None:
    source = cli.folder / "src"
    source.mkdir()
    for name, data in FILES.items():
        (source / name).write_bytes(data)
    write_lock(cli.folder, lock_of({"m@1": {"v": FILES}}, sources=["src"]))


def test_hardlinks_cost_nothing_and_copies_their_size(cli: Cli):
    """A plan counts the blobs, and the trees only where they will have bytes of their own."""
    served(cli)
    whole = sum(map(len, FILES.values()))

    assert summary(cli)["disk_bytes"] == summary(cli, "--link-mode", "symlink")["disk_bytes"] == whole
    assert summary(cli, "--link-mode", "copy")["disk_bytes"] == 2 * whole


def test_reflinks_cost_nothing_where_the_file_system_can_share(cli: Cli):
    """Where it cannot, the fall-back is a copy, and is counted as one before it is made."""
    served(cli)
    whole = sum(map(len, FILES.values()))
    shares = syscalls.can_reflink(str(cli.folder))

    assert summary(cli, "--link-mode", "reflink")["disk_bytes"] == (1 if shares else 2) * whole


def test_a_tree_on_another_disk_that_is_too_small_is_refused_before_the_first_byte(cli: Cli, small_disk: Path):
    """Its files would be copies there: NO_SPACE names that disk, and nothing was fetched."""
    served(cli)

    done = cli.run("ensure", "m", "--into", str(small_disk / "tree"), "--json")

    assert done.code == 6 and done.json["error"]["code"] == "NO_SPACE"
    assert str(small_disk) in done.json["error"]["details"]["path"]
    assert done.json["error"]["details"]["bytes_needed"] == sum(map(len, FILES.values()))
    assert not list((cli.root / "blobs").rglob("?" * 64))


def test_a_tree_on_another_disk_with_room_is_copied_there(cli: Cli, small_disk: Path):
    """What it takes there is not asked of the store's disk."""
    served(cli)
    lock = lock_of({"m@1": {"v": {"b.bin": FILES["b.bin"]}}}, sources=["src"])
    write_lock(cli.folder, lock)

    done = cli.ok("ensure", "m", "--into", str(small_disk / "tree"), "--json").json

    assert done["summary"]["links"]["copy"] == 1
    assert tree_of(small_disk / "tree") == {"b.bin": FILES["b.bin"]}


def test_asking_whether_extents_can_be_shared_leaves_nothing(tmp_path: Path):
    """It is asked by a plan, which changes nothing."""
    syscalls.can_reflink(str(tmp_path))

    assert os.listdir(tmp_path) == []
    assert not syscalls.can_reflink(str(tmp_path / "absent"))


@pytest.mark.parametrize("command", [("evict", "m#a"), ("gc", "--max-size", "1MB"), ("gc", "--free", "2MB")])
def test_a_full_disk_can_be_relieved(cli: Cli, tmp_path: Path, command: tuple[str, ...]):
    """What is to make room needs none itself: neither for a lock nor for a note of what goes."""
    two_variants(cli)
    with disk_of(tmp_path / "small", "16m") as disk:
        store = ("--root", str(disk / "store"))
        cli.ok("ensure", "--all", *store)
        with pytest.raises(OSError), open(disk / "filler", "wb", buffering=0) as filler:
            while True:
                filler.write(bytes(4096))
        assert os.statvfs(disk).f_bfree == 0

        assert cli.run("doctor", *store).code == 1  # and says what is wrong
        cli.ok(*command, *store)
        cli.ok("gc", *store)

        assert os.statvfs(disk).f_bfree * os.statvfs(disk).f_bsize >= 3_000_000
        assert not os.path.exists(disk / "store/models/m@1/a")


def test_a_quota_that_cannot_be_met_evicts_no_tree(cli: Cli):
    """Nothing is evicted for what does not fit in any case (B24)."""
    two_variants(cli)
    cli.ok("ensure", "m#b")

    done = cli.run("ensure", "m#a", MODELSTOW_MAX_SIZE="2MB")

    assert done.code == 6 and "exceed the limit" in done.err
    assert states(cli) == {"a": "NOT_PRESENT", "b": "COMPLETE"}


def test_a_margin_that_eviction_cannot_make_evicts_no_tree(cli: Cli):
    """There is less on the whole disk than is asked to stay free."""
    two_variants(cli)
    cli.ok("ensure", "m#b")

    done = cli.run("ensure", "m#a", MODELSTOW_MIN_FREE="8000TB")

    assert done.code == 6 and states(cli) == {"a": "NOT_PRESENT", "b": "COMPLETE"}


def test_what_a_quota_evicts_is_reported(cli: Cli):
    """The user can read why the tree is gone."""
    two_variants(cli)
    cli.ok("ensure", "m#b")

    done = cli.ok("ensure", "m#a", MODELSTOW_MAX_SIZE="3500KB")

    assert states(cli) == {"a": "COMPLETE", "b": "NOT_PRESENT"}
    assert f"note: evicted {cli.root}/models/m@1/b to make room" in done.err


def test_a_pin_of_the_manifest_holds_from_the_first_ensure_on(cli: Cli):
    """No reconcile is needed, and a tree that existed before it was pinned is pinned by the next ensure."""
    two_variants(cli)
    cli.ok("ensure", "m#b")
    two_variants(cli, pin="pin = true")
    cli.ok("ensure", "m#b")

    refused = cli.run("evict", "m#b")
    cli.ok("gc", "--max-size", "0B")
    assert refused.code == 2 and "`pin = true` from models.toml" in refused.err
    assert cli.run("ensure", "m#a", MODELSTOW_MAX_SIZE="3500KB").code == 6
    assert states(cli)["b"] == "COMPLETE"
    assert "from models.toml" in cli.ok("unpin", "m#b").err

    two_variants(cli)
    cli.ok("ensure", "m#b")
    cli.ok("evict", "m#b")


def test_evicting_says_what_keeps_the_blobs(cli: Cli):
    """A reconciled lockfile does, and a newcomer would wait in vain for gc to free them."""
    two_variants(cli)
    cli.ok("reconcile")

    reported = cli.ok("evict", "m#b").err

    assert "a reconciled lockfile keeps the blobs" in reported and "gc --max-size" in reported
