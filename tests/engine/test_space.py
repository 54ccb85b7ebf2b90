"""Room before the first byte: what is shared costs nothing, what is copied counts where the copy stands."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from builders import Cli, lock_of, some_bytes, tree_of, write_lock

from cas import kernel

FILES = {"a.bin": some_bytes(3_000_000, 1), "b.bin": some_bytes(1_000_000, 2)}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "none", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"nothing can be mounted here: {mounted.stderr.decode()[:80]}")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


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
    shares = kernel.can_clone(str(cli.folder))

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
    kernel.can_clone(str(tmp_path))

    assert os.listdir(tmp_path) == []
    assert not kernel.can_clone(str(tmp_path / "absent"))
