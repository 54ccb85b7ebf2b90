"""What cannot be seen is not gone: nothing is deleted, displaced or forgotten for it."""

from __future__ import annotations

import errno
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from builders import as_user, blobs_of, ensurer_of, lock_of, memory, open_folder, tree_of

from modelstow import ModelEnsurer
from modelstow.cas import BlobStore, presence
from modelstow.reconcile.retention import roots
from modelstow.reconcile.retention.roots import RootState

pytestmark = pytest.mark.slow

FILES = {"config.json": b"{}", "model.bin": b"weights"}
UNSEEN = [errno.EACCES, errno.EIO, errno.ESTALE, errno.ELOOP, errno.ENAMETOOLONG, errno.EPERM, errno.ENXIO]


def world(folder: Path, *, into: Path | None = None) -> ModelEnsurer:
    """A reconciled lockfile, and a tree outside the store where *into* says so."""
    models = ensurer_of(folder, lock_of({"m@1": {"v": FILES}}), memory(FILES))
    if into is not None:
        models.ensure("m", into=into)
    else:
        models.reconcile()
    return models


def unseen(monkeypatch: pytest.MonkeyPatch, path: Path, number: int) -> None:
    """Make every look at *path*, and at what is below, fail."""
    for name in ("lstat", "stat"):
        real = getattr(os, name)

        def fails(at: object, *args: object, real: object = real, **more: object) -> object:
            text = os.fsdecode(at) if isinstance(at, str | bytes | os.PathLike) else ""
            if text == str(path) or text.startswith(f"{path}/"):
                raise OSError(number, os.strerror(number), text)
            return real(at, *args, **more)  # type: ignore[operator]

        monkeypatch.setattr(os, name, fails)


@pytest.mark.parametrize("number", UNSEEN, ids=errno.errorcode.get)
def test_a_lockfile_or_tree_that_cannot_be_looked_at_is_not_dead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
):
    """Its folder can be, and is the same: only ENOENT and ENOTDIR are absence (D1)."""
    models = world(tmp_path, into=tmp_path / "out")
    models.reconcile()
    root = tmp_path / "root"
    for path in (tmp_path / "models.lock", tmp_path / "out", models.local_path("m")):
        with monkeypatch.context() as patched:
            unseen(patched, path, number)
            known = roots.read(BlobStore.open_readonly(root))
            states = {each.path: each.state for each in known.lockfiles}
            states |= {str(each.record.path(root)): each.state for each in known.trees}
            assert states.pop(str(path)) is RootState.UNVERIFIABLE
            assert set(states.values()) == {RootState.ALIVE}


@pytest.mark.parametrize("number", UNSEEN, ids=errno.errorcode.get)
def test_presence_tells_absence_from_what_cannot_be_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int):
    """A missing path and one below a file are absent; every other failure is raised (D1)."""
    (tmp_path / "file").touch()
    os.symlink("nowhere", tmp_path / "dangling")
    os.symlink(tmp_path, tmp_path / "link")
    assert not presence.exists(tmp_path / "nothing") and not presence.exists(tmp_path / "file/below")
    assert presence.exists(tmp_path / "dangling") and presence.is_folder(tmp_path)
    assert not presence.is_folder(tmp_path / "link") and not presence.is_folder(tmp_path / "file")

    unseen(monkeypatch, tmp_path / "file", number)
    for asks in (presence.look, presence.exists, presence.is_folder):
        with pytest.raises(OSError) as caught:
            asks(tmp_path / "file")
        assert caught.value.errno == number


def test_a_symlink_in_models_to_a_disk_that_is_not_there_keeps_its_trees_blobs(tmp_path: Path):
    """The folder is not gone, it is elsewhere (D1)."""
    models = world(tmp_path)
    (tmp_path / "models.lock").unlink()
    disk = tmp_path / "disk"
    (tmp_path / "root/models").rename(disk)
    os.symlink(disk, tmp_path / "root/models")
    disk.rename(tmp_path / "unmounted")

    assert models.collect_garbage().blobs == []
    (tmp_path / "root/models").unlink()
    assert len(models.collect_garbage().blobs) == len(FILES), "now it is gone"


@pytest.mark.parametrize("number", [errno.EACCES, errno.ESTALE], ids=errno.errorcode.get)
def test_a_tree_that_cannot_be_looked_at_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int):
    """It is an error with the path, and what is there stays (F9)."""
    out = tmp_path / "out"
    models = world(tmp_path, into=out)
    (out / "mine.txt").write_bytes(b"the user's own")
    (out / "model.bin").unlink()
    with monkeypatch.context() as patched:
        unseen(patched, out, number)
        with pytest.raises(Exception, match=os.strerror(number)):
            models.ensure("m", into=out)

    assert tree_of(out) == {"config.json": b"{}", "mine.txt": b"the user's own"}
    assert tree_of(models.ensure("m", into=out)) == FILES | {"mine.txt": b"the user's own"}


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to be two users")
def test_a_neighbours_gc_keeps_what_a_folder_that_it_may_not_enter_holds(monkeypatch: pytest.MonkeyPatch):
    """In a shared store: a project of mode 0700 can be seen, what is in it cannot (D1)."""
    with open_folder() as folder:
        project = folder / "project"
        project.mkdir()
        BlobStore.open(folder / "root", shared=True)
        models = world(folder, into=project / "out")
        (folder / "models.lock").rename(project / "models.lock")
        models.settings = replace(models.settings, lockfile=project / "models.lock")
        models.reconcile()
        shutil.rmtree(models.local_path("m"))
        for path in [folder / "root", *(folder / "root").rglob("*")]:
            if not path.is_symlink():
                os.chown(path, -1, 100)
        (project).chmod(0o700)

        found = as_user(1002, lambda: models.collect_garbage().blobs)

        assert found == "[]" and len(blobs_of(folder / "root")) == len(FILES)
