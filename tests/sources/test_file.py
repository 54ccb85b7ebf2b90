"""Folders and file:// keep the contract; what is peculiar to them."""

import os
from pathlib import Path

import pytest

from backends import Denied, NotFound, Source, SourceError
from backends.conformance import SourceContract
from backends.file import FileSource


class FolderContract(SourceContract):
    @pytest.fixture(autouse=True)
    def serve(self, tmp_path: Path) -> None:
        self.top = tmp_path / "models"
        for name, data in self.OBJECTS.items():
            path = self.top / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)

    def make(self) -> Source:
        return FileSource()


class TestFolder(FolderContract):
    def folder(self) -> str:
        return str(self.top)


class TestFileUrl(FolderContract):
    def folder(self) -> str:
        return f"file://{self.top}"


def test_a_listing_follows_links_to_files_and_not_to_folders(tmp_path: Path):
    """A hub's cache is a folder of symlinks; a link to a folder could lead anywhere, or round."""
    (tmp_path / "blob").write_bytes(b"weights")
    (tmp_path / "models").mkdir()
    (tmp_path / "models/model.bin").symlink_to("../blob")
    (tmp_path / "models/loop").symlink_to(tmp_path)

    listing = FileSource().listing(str(tmp_path / "models"))

    assert [(f.path, f.size) for f in listing.files] == [("model.bin", 7)]


def test_a_folder_is_no_object(tmp_path: Path):
    """Opening one is a permanent error."""
    with pytest.raises(NotFound):
        FileSource().open(str(tmp_path))


def test_a_file_url_with_a_host_is_refused():
    """file://host/path would be a network file system that nobody here mounted."""
    with pytest.raises(SourceError, match="names no host"):
        FileSource().open("file://elsewhere/path")


def test_the_two_kinds_of_refusal_are_told_apart():
    """What is not there and what may not be read are different errors."""
    assert issubclass(NotFound, SourceError) and not issubclass(NotFound, Denied)


def test_closing_under_a_read_frees_the_file_only_after_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Freed at once, its number could belong to another file before the bytes are read."""
    (tmp_path / "one").write_bytes(b"one")
    (tmp_path / "two").write_bytes(b"two")
    body, real, others = FileSource().open(str(tmp_path / "one")), os.preadv, []

    def closed_meanwhile(fd: int, views: list[memoryview], at: int) -> int:
        body.close()
        others.append(os.open(tmp_path / "two", os.O_RDONLY))
        return real(fd, views, at)

    monkeypatch.setattr(os, "preadv", closed_meanwhile)
    view = memoryview(bytearray(3))

    assert body.read_into(view) == 3 and bytes(view) == b"one"
    assert body.fd is not None
    with pytest.raises(OSError):
        os.fstat(body.fd)
    with pytest.raises(SourceError):
        body.read_into(view)
    os.close(others[0])
