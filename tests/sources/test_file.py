"""Folders and file:// keep the contract; what is special about them."""

import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from modelstow.backends import AccessDenied, NotFound, Source, SourceError
from modelstow.backends.conformance import SourceContract
from modelstow.backends.file import FileSource

_NOBODY = 65534


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


def test_a_listing_follows_links_to_files_and_folders(tmp_path: Path):
    """A hub's cache is a folder of symlinks, and large parts of a model are linked from another disk."""
    (tmp_path / "blob").write_bytes(b"weights")
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared/vae.bin").write_bytes(b"vae")
    (tmp_path / "models").mkdir()
    (tmp_path / "models/model.bin").symlink_to("../blob")
    (tmp_path / "models/vae").symlink_to(tmp_path / "shared")

    listing = FileSource().listing(str(tmp_path / "models"))

    assert [(f.path, f.size) for f in listing.files] == [("model.bin", 7), ("vae/vae.bin", 3)]


@pytest.mark.parametrize("target", [".", "..", "../top", "/proc/self/cwd"])
def test_links_that_lead_round_end(target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """What is in a folder above is listed there, however many links lead to it."""
    top = tmp_path / "top"
    (top / "deep").mkdir(parents=True)
    monkeypatch.chdir(top)
    (top / "model.bin").write_bytes(b"weights")
    (top / "deep/round").symlink_to(target)
    (top / "round").symlink_to(target)

    paths = [f.path for f in FileSource().listing(str(top)).files]

    assert "model.bin" in paths and all(path.count("round") <= 2 for path in paths)


def test_what_cannot_be_read_is_listed_with_its_error(tmp_path: Path):
    """Only who wants it has to be told: a link that leads nowhere, or to itself."""
    (tmp_path / "a.bin").write_bytes(b"a")
    (tmp_path / "gone.bin").symlink_to("nowhere")
    (tmp_path / "self.bin").symlink_to("self.bin")

    found = {f.path: f.error for f in FileSource().listing(str(tmp_path)).files}

    assert found.pop("a.bin") is None
    assert {path: "link" in error.hint and path in str(error) for path, error in found.items() if error} == {
        "gone.bin": True,
        "self.bin": True,
    }


def test_a_folder_is_no_object(tmp_path: Path):
    """Opening one is a permanent error."""
    with pytest.raises(NotFound):
        FileSource().open(str(tmp_path))


def test_a_file_url_with_a_host_is_refused():
    """file://host/path would be a network file system that is not mounted here."""
    with pytest.raises(SourceError, match="names no host"):
        FileSource().open("file://elsewhere/path")


def asks(locator: str) -> list[Callable[[], object]]:
    """Every way of asking for a file, or for the folder that would hold it."""
    source, folder = FileSource(), locator.rpartition("/")[0]
    return [lambda: source.open(locator), lambda: source.size(locator), lambda: source.listing(folder)]


@pytest.mark.parametrize("path", ["nowhere/x", "file/x", f"{'n' * 300}/x"], ids=["gone", "below a file", "too long"])
def test_what_is_not_there_is_not_found(tmp_path: Path, path: str):
    """Whatever errno it is, retrying cannot help, and the error does not blame permissions."""
    (tmp_path / "file").write_bytes(b"")

    for ask in asks(str(tmp_path / path)):
        with pytest.raises(NotFound) as caught:
            ask()
        assert not caught.value.transient and "permission" not in str(caught.value)


@pytest.fixture
def closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A folder that may be seen and not entered, also where the tests are run by root."""
    folder, who = tmp_path / "closed", os.geteuid()
    folder.mkdir(mode=0o000)
    tmp_path.chmod(0o755)
    monkeypatch.chdir(tmp_path)  # other users may not enter the folders above
    try:
        os.seteuid(_NOBODY if who == 0 else who)
    except OSError:
        pytest.skip("this root cannot become another user")
    yield "closed"
    os.seteuid(who)
    folder.chmod(0o700)


def test_what_may_not_be_read_is_denied(closed: str):
    """It is not reported as missing: the user has to check permissions."""
    for ask in (*asks(f"{closed}/x"), *asks(f"{closed}/folder/x")):
        with pytest.raises(AccessDenied, match="permission denied") as caught:
            ask()
        assert not caught.value.transient and "who may read" in caught.value.hint


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


def test_a_sync_that_failed_is_not_repeated_on_that_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The second one would say that all is well, and the pages are gone."""
    target, data, real = str(tmp_path / "object"), b"weights" * 1000, os.fsync
    failing = [True]

    def fsync(fd: int) -> None:
        if failing.pop() if failing else False:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)

    def put() -> int:
        return FileSource().put(target, len(data), lambda start, stop: data[start:stop], lambda count: None)

    with pytest.raises(SourceError):
        put()
    assert os.listdir(tmp_path) == []
    assert put() == len(data) and Path(target).read_bytes() == data
