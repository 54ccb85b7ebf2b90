"""Placing a blob in a tree, and the fall-backs that are reported."""

import errno
import os
import stat
import subprocess
from functools import partial
from pathlib import Path

import pytest
from store_fixtures import MIDDLE, SMALL, mounted, root_only, store_at, umask

from modelstow.cas import EMPTY, Digest, LinkError, LinkKind, LinkMode, links
from modelstow.cas.errors import Cause
from modelstow.cas.links import Linker

DIGEST = Digest.of(MIDDLE)


def place(
    tmp_path: Path, linker: Linker, name: str = "file", *, blob: str | None = None, into: Path | None = None
) -> LinkKind:
    """Place the blob of MIDDLE (or *blob*) as *name* into the folder ``tree`` (or *into*)."""
    folder = into or tmp_path / "tree"
    folder.mkdir(exist_ok=True)
    if blob is None:
        store = store_at(tmp_path)
        store.ingest.add_bytes(MIDDLE)
        blob = store.layout.blob(DIGEST)
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        return linker.place(blob, DIGEST, len(MIDDLE), fd, name)
    finally:
        os.close(fd)


def refusing(monkeypatch: pytest.MonkeyPatch, number: int, times: int = 1 << 30) -> list[int]:
    """Let os.link fail *times* times with an errno; the calls."""
    real, calls = os.link, []

    def link(*args, **more):
        calls.append(1)
        if len(calls) <= times:
            raise OSError(number, os.strerror(number))
        return real(*args, **more)

    monkeypatch.setattr(os, "link", link)
    return calls


def carries_the_proof(path: Path) -> bool:
    found = path.stat()
    return found.st_mtime_ns == DIGEST.mtime * 10**9 and stat.S_IMODE(found.st_mode) == 0o444


def test_a_hardlink_is_the_blobs_inode(tmp_path: Path):
    """No byte is stored twice."""
    kind = place(tmp_path, Linker(LinkMode.AUTO))

    assert kind is LinkKind.HARDLINK
    assert (tmp_path / "tree/file").stat().st_ino == os.stat(store_at(tmp_path).layout.blob(DIGEST)).st_ino


@pytest.mark.parametrize("mask", [0o000, 0o077])
def test_a_copy_has_an_inode_of_its_own_and_carries_the_same_proof(tmp_path: Path, mask: int):
    """Size, mtime and mode are those of its blob, whatever the umask (M3)."""
    with umask(mask):
        kind = place(tmp_path, Linker(LinkMode.COPY))

    assert kind is LinkKind.COPY
    assert (tmp_path / "tree/file").read_bytes() == MIDDLE and (tmp_path / "tree/file").stat().st_nlink == 1
    assert carries_the_proof(tmp_path / "tree/file")


def test_a_symlink_says_what_it_is_told(tmp_path: Path):
    """By default the blob's path."""
    assert place(tmp_path, Linker(LinkMode.SYMLINK)) is LinkKind.SYMLINK
    assert os.readlink(tmp_path / "tree/file") == store_at(tmp_path).layout.blob(DIGEST)


@pytest.mark.parametrize("mask", [0o000, 0o022, 0o077])
def test_an_empty_file_is_created_not_linked(tmp_path: Path, mask: int):
    """OSTree once changed every empty file of a system through one of them; the mode is 0644 whatever the umask."""
    fd = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    with umask(mask):
        kind = Linker(LinkMode.HARDLINK, strict=True).place("/nowhere", EMPTY, 0, fd, "empty")
    os.close(fd)

    found = (tmp_path / "empty").stat()
    assert kind is LinkKind.EMPTY and (found.st_size, found.st_nlink) == (0, 1)
    assert stat.S_IMODE(found.st_mode) == 0o644


def test_too_many_links_costs_a_copy_for_this_file_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """EMLINK concerns one inode, not the file system (F5)."""
    refusing(monkeypatch, errno.EMLINK, times=1)
    store = store_at(tmp_path)
    # The commit of the blob itself uses link(2), so it is made by hand.
    blob = Path(store.layout.blob(DIGEST))
    blob.write_bytes(MIDDLE)
    linker = Linker(LinkMode.AUTO)

    first = place(tmp_path, linker, "first", blob=str(blob))
    second = place(tmp_path, linker, "second", blob=str(blob))

    assert first in (LinkKind.REFLINK, LinkKind.COPY) and second is LinkKind.HARDLINK
    assert carries_the_proof(tmp_path / "tree/first")


@pytest.mark.parametrize("number", [errno.EXDEV, errno.EPERM, errno.EOPNOTSUPP])
def test_what_does_not_work_here_is_tried_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int):
    """Another file system, protected_hardlinks, FAT (F6, F7)."""
    store_at(tmp_path).ingest.add_bytes(MIDDLE)
    blob = store_at(tmp_path).layout.blob(DIGEST)
    calls = refusing(monkeypatch, number)
    linker = Linker(LinkMode.AUTO)

    kinds = [place(tmp_path, linker, name, blob=blob) for name in ("a", "b", "c")]

    assert len(calls) == 1 and set(kinds) <= {LinkKind.REFLINK, LinkKind.COPY}
    assert (tmp_path / "tree/c").read_bytes() == MIDDLE


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EROFS])
def test_a_failure_is_no_reason_to_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int):
    """A full disk is reported, not filled further."""
    store_at(tmp_path).ingest.add_bytes(MIDDLE)
    blob = store_at(tmp_path).layout.blob(DIGEST)
    refusing(monkeypatch, number)

    with pytest.raises(OSError) as caught:
        place(tmp_path, Linker(LinkMode.AUTO), blob=blob)
    assert caught.value.errno == number
    assert list((tmp_path / "tree").iterdir()) == []


def test_strict_links_make_a_fall_back_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """It names the file, the kind and the reason."""
    store_at(tmp_path).ingest.add_bytes(MIDDLE)
    blob = store_at(tmp_path).layout.blob(DIGEST)
    refusing(monkeypatch, errno.EXDEV)

    with pytest.raises(LinkError, match="cannot hardlink file") as caught:
        place(tmp_path, Linker(LinkMode.HARDLINK, strict=True), blob=blob)
    assert caught.value.cause is Cause.LINK_UNAVAILABLE and list((tmp_path / "tree").iterdir()) == []


def test_a_copy_that_fails_leaves_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Half a file under a tree's path would be wrong content."""
    store_at(tmp_path).ingest.add_bytes(MIDDLE)
    blob = store_at(tmp_path).layout.blob(DIGEST)

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "copy_file_range", full)

    with pytest.raises(OSError, match="No space"):
        place(tmp_path, Linker(LinkMode.COPY), blob=blob)
    assert list((tmp_path / "tree").iterdir()) == []


def test_a_copy_works_where_the_kernel_cannot_help(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """copy_file_range is not everywhere."""
    store_at(tmp_path).ingest.add_bytes(MIDDLE)
    blob = store_at(tmp_path).layout.blob(DIGEST)

    def missing(*_: object) -> int:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(os, "copy_file_range", missing)

    assert place(tmp_path, Linker(LinkMode.COPY), blob=blob) is LinkKind.COPY
    assert (tmp_path / "tree/file").read_bytes() == MIDDLE


def test_a_blob_shorter_than_its_record_is_not_copied_short(tmp_path: Path):
    """The copy would carry a proof that is not its own."""
    store = store_at(tmp_path)
    store.ingest.add_bytes(MIDDLE)
    os.truncate(store.layout.blob(DIGEST), 100)

    with pytest.raises(OSError, match="shorter"):
        place(tmp_path, Linker(LinkMode.COPY), blob=store.layout.blob(DIGEST))
    assert list((tmp_path / "tree").iterdir()) == []


def test_a_taken_name_is_not_overwritten_by_place(tmp_path: Path):
    """Only ``replace`` does that."""
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree/file").write_text("mine")

    with pytest.raises(FileExistsError):
        place(tmp_path, Linker(LinkMode.AUTO))
    assert (tmp_path / "tree/file").read_text() == "mine"


@pytest.mark.parametrize("before", ["nothing", "other", "same inode", "symlink"])
def test_replace_switches_a_name_in_one_step_and_leaves_nothing_next_to_it(tmp_path: Path, before: str):
    """rename(2) on two names of one inode does nothing and keeps both."""
    store = store_at(tmp_path)
    store.ingest.add_bytes(SMALL)
    blob, digest = store.layout.blob(Digest.of(SMALL)), Digest.of(SMALL)
    folder, outside = tmp_path / "tree", tmp_path / "outside"
    folder.mkdir()
    outside.write_text("mine")
    if before == "other":
        (folder / "file").write_text("old")
    if before == "same inode":
        os.link(blob, folder / "file")
    if before == "symlink":
        (folder / "file").symlink_to(outside)

    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    links.replace(partial(Linker(LinkMode.AUTO).place, blob, digest, len(SMALL), fd), fd, "file")
    os.close(fd)

    assert os.listdir(folder) == ["file"] and (folder / "file").stat().st_ino == os.stat(blob).st_ino
    assert outside.read_text() == "mine" and os.stat(blob).st_nlink == 2


def test_replacing_a_folder_fails_and_leaves_nothing_next_to_it(tmp_path: Path):
    """A folder may hold the user's files; it has to be displaced first."""
    store = store_at(tmp_path)
    store.ingest.add_bytes(SMALL)
    (tmp_path / "tree/file").mkdir(parents=True)
    fd = os.open(tmp_path / "tree", os.O_RDONLY | os.O_DIRECTORY)
    digest = Digest.of(SMALL)

    with pytest.raises(OSError):
        links.replace(partial(Linker(LinkMode.AUTO).place, store.layout.blob(digest), digest, len(SMALL), fd), fd, "file")
    os.close(fd)

    assert os.listdir(tmp_path / "tree") == ["file"]


@root_only
def test_another_file_system_gives_a_copy_and_it_is_reported(tmp_path: Path):
    """EXDEV for real (F6)."""
    with mounted(tmp_path / "other", "-t", "tmpfs", "-o", "size=4m", "tmpfs") as folder:
        kind = place(tmp_path, Linker(LinkMode.AUTO), into=folder)

        assert kind is LinkKind.COPY and carries_the_proof(folder / "file")
        with pytest.raises(LinkError):
            place(tmp_path, Linker(LinkMode.HARDLINK, strict=True), "strict", into=folder)


@root_only
def test_a_bind_mount_of_the_same_file_system_gives_a_copy(tmp_path: Path):
    """EXDEV although both are one device (F6)."""
    (tmp_path / "real").mkdir()
    with mounted(tmp_path / "bound", "--bind", str(tmp_path / "real")) as folder:
        assert place(tmp_path, Linker(LinkMode.AUTO), into=folder) in (LinkKind.REFLINK, LinkKind.COPY)


@pytest.mark.slow
@root_only
def test_the_last_link_that_ext4_allows_is_followed_by_a_copy(tmp_path: Path):
    """EMLINK for real: 65,000 names of one inode (F5)."""
    image = tmp_path / "image"
    with open(image, "wb") as file:
        file.truncate(16 << 20)
    made = subprocess.run(["mkfs.ext4", "-q", "-F", "-N", "2000", str(image)], capture_output=True)
    if made.returncode != 0:
        pytest.skip("cannot make an ext4 image")
    with mounted(tmp_path / "ext4", "-o", "loop", str(image)) as folder:
        blob = folder / "blob"
        blob.write_bytes(MIDDLE)
        (folder / "many").mkdir()
        fd = os.open(folder / "many", os.O_RDONLY | os.O_DIRECTORY)
        for number in range(64_999):
            os.link(blob, str(number), dst_dir_fd=fd)
        os.close(fd)

        kind = place(tmp_path, Linker(LinkMode.AUTO), blob=str(blob), into=folder / "tree")

        assert kind is LinkKind.COPY and (folder / "tree/file").read_bytes() == MIDDLE
