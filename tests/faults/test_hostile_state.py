"""What others may have laid into a store's own folders: it is read as data, never waited for, and harms its owner alone."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from builders import CalledCli, Cli, manifest_of, tree_of

from modelstow.cas import BlobStore, Digest, locks
from modelstow.cas.inventory import tree_id
from modelstow.cas.untrusted import Writers, read_state
from modelstow.reconcile import snapshot
from modelstow.reconcile.retention import roots

pytestmark = pytest.mark.slow

FILES = {"config.json": b"{}", "model.bin": b"weights" * 200_000}
NESTED = b"[" * 60_000
OVERFLOW = b'{"pid": 1e999, "host": "h", "boot": "b", "started": "1", "since": 1e999, "doing": "x"}'


def fifo(path: Path) -> None:
    os.mkfifo(path)


def endless(path: Path) -> None:
    path.symlink_to("/dev/zero")


def nested(path: Path) -> None:
    path.write_bytes(NESTED)


def overflow(path: Path) -> None:
    path.write_bytes(b'{"holder": ' + OVERFLOW + b"}" if path.parent.name == "locks" else OVERFLOW)


def enormous(path: Path) -> None:
    path.touch()
    os.truncate(path, 1 << 40)


def torn(path: Path) -> None:
    path.write_bytes(b'{"kind": "lockfile", "ver')


def deep_record(path: Path) -> None:
    import xxhash

    path.write_bytes(NESTED + b"\n" + xxhash.xxh3_128_hexdigest(NESTED).encode() + b"\n")


HOSTILE = [fifo, endless, nested, overflow, enormous, torn, deep_record]
ROOTS = ["state/leases/z.lease", "state/roots/zz", "state/inventories/zz", "pins/zz"]
CACHES = ["state/epoch", "state/verifying/zz-01234567", "state/locks/gate", "state/locks/store", "state/locks/blob-000"]
CACHES += ["bad-sources", "hash-cache", "snapshots", "blob lock", "tree lock", "verifying the tree", "state/.tmp-0123"]


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a store in which a lockfile was reconciled."""
    return reconciled(tmp_path_factory.mktemp("template"))


def reconciled(folder: Path) -> Path:
    (folder / "source").mkdir(parents=True)
    for name, data in FILES.items():
        (folder / "source" / name).write_bytes(data)
    (folder / "models.toml").write_text(manifest_of("source"))
    Cli(folder).ok("lock")
    Cli(folder).ok("reconcile")
    return folder


@pytest.fixture
def cli(tmp_path: Path, template: Path) -> CalledCli:
    """A copy of it."""
    shutil.copytree(template, tmp_path / "world", symlinks=True)
    return CalledCli(tmp_path / "world")


def place(cli: Cli, where: str) -> Path:
    """The path of a file in the store, free of what was there."""
    hex_ = Digest.of(FILES["model.bin"]).hex
    names = {
        "bad-sources": f"state/bad-sources/{hex_}",
        "hash-cache": "state/hash-cache/zz",
        "snapshots": os.path.relpath(snapshot.path_of(str(cli.root), str(cli.folder / "models.lock")), cli.root),
        "blob lock": f"state/locks/blob-{hex_[:3]}",
        "tree lock": f"state/locks/tree-{tree_id('models/m@1/v')}",
        "verifying the tree": f"state/verifying/{tree_id('models/m@1/v')}-01234567",
    }
    path = cli.root / names.get(where, where)
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    return path


@pytest.mark.parametrize("lay", HOSTILE, ids=lambda lay: lay.__name__)
@pytest.mark.parametrize("where", [*ROOTS, *CACHES])
def test_what_is_laid_in_a_store_stops_garbage_collection_at_most(cli: Cli, where: str, lay: Callable[[Path], None]):
    """No command waits for a pipe, reads a device or calls it a bug; what is needed for the work is made again (M7)."""
    lay(place(cli, where))
    shutil.rmtree(cli.root / "models/m@1")
    commands = [("status",), ("plan",), ("ensure", "m"), ("reconcile",), ("verify",), ("verify", "--repair"), ("lock",)]
    for command in commands:
        ran = cli.run(*command)
        assert ran.code == 0, (command, ran.err)
    ran = cli.run("gc")

    assert ran.code == (1 if where in ROOTS else 0), ran.err
    assert "bug" not in ran.err and (where not in ROOTS or "cannot be read" in ran.err)
    assert tree_of(cli.root / "models/m@1/v") == FILES


@pytest.mark.parametrize("damage", [torn, fifo, deep_record], ids=lambda lay: lay.__name__)
@pytest.mark.parametrize("folder", ["roots", "inventories"])
def test_another_lockfiles_damaged_record_stops_garbage_collection_alone(
    tmp_path: Path, folder: str, damage: Callable[[Path], None]
):
    """One bad block of a disk must not stop whoever shares the store; no tree is removed that it may name (M7)."""
    cli = CalledCli(reconciled(tmp_path / "world"))
    other = cli.folder / "other"
    other.mkdir()
    (other / "source").mkdir()
    (other / "source/w.bin").write_bytes(b"other weights")
    (other / "models.toml").write_text(manifest_of("source").replace('"m"', '"n"'))
    for command in ("lock", "reconcile"):
        cli.ok(command, "--manifest", other / "models.toml", "--lock", other / "models.lock")
    record = cli.root / "state" / folder / tree_id(str(other / "models.lock") if folder == "roots" else "models/n@1/v")
    record.unlink()
    damage(record)
    shutil.rmtree(cli.root / "models/m@1")

    for command in ("ensure", "reconcile", "verify", "plan", "status"):
        cli.ok(command, *(["m"] if command == "ensure" else []))
    assert cli.run("gc").code == 1
    (cli.folder / "models.toml").write_text("schema = 1\n")
    cli.ok("lock")
    cli.ok("reconcile")
    assert (cli.root / "models/m@1").exists() is (folder == "roots"), "the lost root may name it"
    assert (cli.root / "models/n@1/v/w.bin").exists()
    if folder == "roots":
        cli.ok("gc", "--forget", record.name)
        cli.ok("gc")


def test_a_private_store_reads_files_of_its_user_and_of_root_alone(tmp_path: Path):
    """A file that another user has put there is no record (M1)."""
    (tmp_path / "file").write_bytes(b"content")
    mine = Writers.of(tmp_path, shared=False)
    assert read_state(tmp_path / "file", mine) == b"content"
    with pytest.raises(PermissionError, match="another user"):
        read_state(tmp_path / "file", Writers(frozenset({os.geteuid() + 1})))
    assert Writers.of(tmp_path, shared=True).readable is None
    assert Writers.of(tmp_path / "nothing", shared=False).readable == {os.geteuid(), 0}


def test_a_lock_file_with_a_second_link_is_not_written_to(tmp_path: Path):
    """It may be a name that another user has given to a file of this one (M6)."""
    mine = tmp_path / "mine"
    mine.write_text("mine")
    mine.chmod(0o644)
    os.link(mine, tmp_path / "lock")
    with locks.acquire(tmp_path / "lock", doing="test"):
        assert mine.read_text() == "mine" and mine.stat().st_mode & 0o777 == 0o644


def test_forgetting_a_root_does_not_leave_the_folders_of_roots(tmp_path: Path):
    """An id is a bare name (I7)."""
    store = BlobStore.open(tmp_path / "root")
    (tmp_path / "root/state/victim").touch()
    assert not roots.forget(store, "../victim") and (tmp_path / "root/state/victim").exists()
