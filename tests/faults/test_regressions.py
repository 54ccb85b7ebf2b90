"""What attacks on the running program found once, so that it does not come back."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
from builders import CalledCli, Cli, assert_sound, ensurer_of, leftovers, lock_of, memory, some_bytes, tree_of, write_lock

from modelstow import ModelState
from modelstow.backends import Body
from modelstow.backends.memory import MemorySource
from modelstow.cas import Digest, LinkMode, tree
from modelstow.reconcile.errors import as_ours
from modelstow.reconcile.events.events import BlobFetched, Event, Warning

pytestmark = pytest.mark.slow

OLD = {"config.json": b"{}", "model.bin": b"old weights"}
NEW = {"config.json": b"{}", "model.bin": b"new weights!"}


def test_a_failure_right_after_the_exchange_loses_no_file_of_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The staging name is the old tree by then: it is left to the next run, which drains it."""
    models = ensurer_of(tmp_path, lock_of({"m@1": {"v": OLD}}), memory(OLD))
    path = models.ensure("m")
    (path / "model.bin").unlink()
    (path / "model.bin").write_bytes(b"edited by the user")
    (path / "mine.txt").write_bytes(b"the user's own")
    again = ensurer_of(tmp_path, lock_of({"m@1": {"v": NEW}}), memory(NEW))

    def fails(folder: Path) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(folder))

    with monkeypatch.context() as broken:
        broken.setattr(tree, "fsync_folder", fails)
        assert again.ensure_all(["m"]).error is not None
    again.ensure("m")

    assert tree_of(path) == NEW | {"mine.txt": b"the user's own"}
    kept = [p.read_bytes() for p in (tmp_path / "root/quarantine").rglob("*") if p.is_file()]
    assert kept == [b"edited by the user"]
    assert leftovers(tmp_path / "root") == []


def test_one_strange_failure_does_not_stop_the_next_run(tmp_path: Path):
    """A source that raises what no source should costs itself, not the ensurer that others share."""

    class Strange(MemorySource):
        def open(self, locator: str, *, start: int = 0, stop: int | None = None) -> Body:
            raise ZeroDivisionError("a bug")

    models = ensurer_of(tmp_path, lock_of({"m@1": {"v": OLD}}), Strange({}))
    outcome = models.ensure_all(["m"])
    models.factories = {**models.factories, "mem": lambda: memory(OLD)}
    models._registry = None

    assert outcome.error is not None and outcome.error.code == "UNKNOWN_ERROR"
    assert tree_of(models.ensure("m")) == OLD


def test_a_wrong_local_file_does_not_cost_what_was_fetched(tmp_path: Path):
    """A foreign file of the right size is tried, found wrong, and the partial is resumed."""
    data = some_bytes(20_000_000, 5)
    digest = Digest.of(data)
    models = ensurer_of(tmp_path, lock_of({"m@1": {"v": {"w": data}}}), memory({"w": data}))
    from modelstow.cas import BlobStore
    from modelstow.cas.pieces import piece_hash

    store = BlobStore.open(tmp_path / "root")
    partial = store.ingest.open(digest, len(data))
    partial.write(0, data[: 8 << 20])
    partial.finish(0, piece_hash(data[: 8 << 20]))
    partial.close()
    models.local_path("m").mkdir(parents=True)
    (models.local_path("m") / "w").write_bytes(bytes(len(data)))

    outcome = models.ensure_all(["m"])

    assert outcome.report.resumed_bytes == 8 << 20
    assert (models.local_path("m") / "w").read_bytes() == data


def test_opening_a_file_while_gc_asks_whether_it_is_used_ends_no_process(tmp_path: Path):
    """A broken write lease sends SIGIO, whose default is to end the process."""
    victim = tmp_path / "file"
    victim.write_bytes(b"x")
    code = (
        "import os, sys, threading\n"
        "from modelstow.cas import syscalls\n"
        "stop = False\n"
        "def opens():\n"
        "    while not stop:\n"
        "        os.close(os.open(sys.argv[1], os.O_RDONLY))\n"
        "thread = threading.Thread(target=opens)\n"
        "thread.start()\n"
        "for _ in range(300):\n"
        "    syscalls.in_use(sys.argv[1])\n"
        "stop = True\n"
        "thread.join()\n"
    )
    here = Path(__file__).resolve().parents[2]

    done = subprocess.run(
        [sys.executable, "-c", code, str(victim)], env={**os.environ, "PYTHONPATH": str(here)}, timeout=120
    )

    assert done.returncode == 0


@pytest.fixture
def cli(tmp_path: Path) -> CalledCli:
    """The command line as a function, in an empty folder with an empty store."""
    return CalledCli(tmp_path)


def test_a_restored_store_removes_a_tree_in_one_step_and_marks_no_source(cli: Cli):
    """After `cp -a` every inode is another: files that carry their proof are still ours (D11)."""
    (cli.folder / "src").mkdir()
    for path, data in OLD.items():
        (cli.folder / "src" / path).write_bytes(data)
    write_lock(cli.folder, lock_of({"m@1": {"v": OLD}}, sources=["src"]))
    cli.ok("reconcile")
    subprocess.run(["cp", "-a", cli.root, cli.folder / "copy"], check=True)
    subprocess.run(["rm", "-r", cli.root], check=True)
    (cli.folder / "copy").rename(cli.root)
    write_lock(cli.folder, lock_of({"n@1": {"v": {"config.json": b"{}"}}}, sources=["src"]))

    cli.ok("reconcile")

    assert not (cli.root / "models/m@1").exists()
    assert list((cli.root / "quarantine").iterdir()) == []
    assert_sound(cli.root)


def test_links_that_dangle_are_not_complete(tmp_path: Path):
    """An outside tree of symlinks is looked at where they lead."""
    from dataclasses import replace

    models = ensurer_of(tmp_path, lock_of({"m@1": {"v": OLD}}), memory(OLD))
    models.settings = replace(models.settings, link_mode=LinkMode.SYMLINK)
    path = models.ensure("m", into=tmp_path / "out")
    (tmp_path / "root").rename(tmp_path / "elsewhere")
    models.settings = replace(models.settings, root=tmp_path / "elsewhere")

    models.ensure("m", into=tmp_path / "out")

    assert tree_of(path) == OLD


@pytest.mark.parametrize("torn", ["own root", "lease"])
def test_a_torn_record_in_state_stops_gc_and_nothing_else(tmp_path: Path, torn: str):
    """A process that fetches continues; one that deletes does not."""
    models = ensurer_of(tmp_path, lock_of({"m@1": {"v": OLD}}), memory(OLD))
    models.reconcile()
    if torn == "lease":
        (tmp_path / "root/state/leases/torn.lease").write_text("{")
    else:
        [root] = (tmp_path / "root/state/roots").iterdir()
        root.write_bytes(root.read_bytes()[:50])
    again = ensurer_of(tmp_path, lock_of({"m@1": {"v": NEW}}), memory(NEW))

    assert again.reconcile().error is None
    assert again.status("m").state is ModelState.COMPLETE


def test_into_a_file_is_refused_before_anything_is_touched(cli: Cli):
    """The file may be the user's only copy, even the source itself."""
    (cli.folder / "src").mkdir()
    (cli.folder / "src/config.json").write_bytes(b"{}")
    write_lock(cli.folder, lock_of({"m@1": {"v": {"config.json": b"{}"}}}, sources=["src"]))

    ran = cli.run("ensure", "m", "--into", "src/config.json", "--json")

    assert ran.code == 2 and ran.json["error"]["code"] == "INVALID_CONFIG"
    assert (cli.folder / "src/config.json").read_bytes() == b"{}" and not cli.root.exists()


def test_pruned_files_are_named(cli: Cli):
    """What --prune removes is listed, for people and in JSON."""
    (cli.folder / "src").mkdir()
    (cli.folder / "src/config.json").write_bytes(b"{}")
    write_lock(cli.folder, lock_of({"m@1": {"v": {"config.json": b"{}"}}}, sources=["src"]))
    cli.ok("reconcile")
    extra = cli.root / "models/m@1/v/mine.txt"
    extra.write_text("x")

    done = cli.ok("reconcile", "--prune", "--json").json

    assert done["pruned"] == [str(extra)] and not extra.exists()


def test_a_forged_size_in_a_piece_table_is_no_table(tmp_path: Path):
    """It would claim a slot for every piece of four exabytes."""
    from modelstow.cas.pieces import PieceTable, TableState

    digest = Digest.of(b"x")
    forged = PieceTable(digest, 1, state=TableState.PROVEN)
    forged.size = 1 << 62

    assert PieceTable.decode(forged.encode(), digest) is None


def test_pruning_does_not_reach_through_a_folder_that_became_a_symlink(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Swapped between looking and removing, the folder leads out of the tree: nothing there is touched (L11)."""
    from modelstow import EnsureOptions

    models = ensurer_of(tmp_path, lock_of({"m@1": {"v": OLD}}), memory(OLD))
    path = models.ensure("m")
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "keys").write_bytes(b"not the tree's")
    (path / "d").mkdir()
    (path / "d/keys").write_bytes(b"the user's")
    real = tree.unlink

    def swapped(root: Path | str, name: str) -> None:
        if name == "d/keys":
            (path / "d").rename(path / "d2")
            (path / "d").symlink_to(outside)
        real(root, name)

    monkeypatch.setattr(tree, "unlink", swapped)

    models.ensure_all(["m"], options=EnsureOptions(prune=True))

    assert (outside / "keys").read_bytes() == b"not the tree's"


@pytest.mark.parametrize("at", ["the start", "the first bytes", "the end"])
def test_a_mistake_of_the_caller_is_not_blamed_on_a_source(tmp_path: Path, at: str):
    """A progress callback that raises ValueError is dropped with a warning: it says nothing about who sent the bytes."""
    files = {"weights": some_bytes(3 << 20)}
    models = ensurer_of(tmp_path, lock_of({"m@1": {"x": files}}), memory(files))
    raises = {"the start": lambda done, total: not done, "the first bytes": lambda done, total: done > 0}
    heard: list[Event] = []
    calls: list[int] = []

    def progress(done: int, total: int) -> None:
        calls.append(done)
        if raises.get(at, lambda done, total: done == total)(done, total):
            raise ValueError("the caller's own")

    with models.events.subscribe(heard.append):
        path = models.ensure("m", progress_callback=progress)

    assert tree_of(path) == files and models.failed_sources == {}
    [warning] = [event.text for event in heard if isinstance(event, Warning)]
    assert warning == "a listener of events failed and is not called again (ValueError: the caller's own)"
    assert len(calls) == {"the start": 1, "the first bytes": 2}.get(at, len(calls))


@pytest.mark.parametrize("options", [(), ("--json",)])
def test_an_output_that_cannot_be_written_is_one_line_of_error(cli: Cli, options: tuple[str, ...]):
    """A report redirected to a full disk: exit 1 and no traceback."""
    write_lock(cli.folder, lock_of({"m@1": {"v": {"a": b"a"}}}))
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            cli.argv("ls", *options), cwd=cli.folder, env=cli.environ(), stdout=full, stderr=subprocess.PIPE, text=True
        )

    assert done.returncode == 1 and "standard output cannot be written" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("selectors", [None, ["m"]], ids=["all", "one"])
def test_a_repair_that_was_killed_is_finished_by_the_same_command(tmp_path: Path, selectors: list[str] | None):
    """Nothing is damaged any more, but the change of the tree did not end (C4)."""
    from modelstow.cas import BlobStore
    from modelstow.cas.scrub import Level

    models = ensurer_of(tmp_path, lock_of({"m@1": {"v": OLD}}), memory(OLD))
    models.reconcile()
    trees = BlobStore.open(tmp_path / "root").trees
    record = trees.read("models/m@1/v")
    assert record is not None
    trees.write_intent(record)
    beside = models.local_path("m") / ".modelstow-0123456789ab"
    beside.write_bytes(b"half")
    assert models.status("m").state is ModelState.PARTIAL and models.status("m").extra_files == ()

    models.verify(selectors, Level.FAST, repair=True)

    assert models.status("m").state is ModelState.COMPLETE
    assert tree_of(models.local_path("m")) == OLD


def test_a_temporary_name_of_ours_does_not_move_into_the_next_tree(tmp_path: Path):
    """A kill left it, and no record says so: an upgrade does not take it for the user's file (B22)."""
    models = ensurer_of(tmp_path, lock_of({"m@1": {"v": OLD}}), memory(OLD))
    (models.ensure("m") / ".modelstow-0123456789ab").write_bytes(b"half")
    assert models.status("m").extra_files == ()
    path = ensurer_of(tmp_path, lock_of({"m@1": {"v": NEW}}), memory(NEW)).ensure("m")
    assert tree_of(path) == NEW


def test_blobs_that_went_while_a_process_slept_are_an_error_that_says_to_run_again(tmp_path: Path):
    """It was stopped until its lease was removed, and gc ran (C20)."""
    root = tmp_path / "root"
    models = ensurer_of(tmp_path, lock_of({"m@1": {"v": OLD}}), memory(OLD))

    def sweeps(event: Event) -> None:
        if isinstance(event, BlobFetched):
            for path in (root / "blobs").rglob("*"):
                if path.is_file():
                    path.unlink()

    models.events.subscribe(sweeps)
    error = models.ensure_all(["m"]).error

    assert error is not None and "went from the store" in str(error) and "again" in error.hint
    assert tree_of(ensurer_of(tmp_path, lock_of({"m@1": {"v": OLD}}), memory(OLD)).ensure("m")) == OLD


def test_too_little_memory_is_not_called_a_bug():
    """The user can do something about it."""
    found = as_ours(MemoryError())
    assert found is not None and "memory" in found.what and "bug" not in found.hint
