"""The short way of commands without work: it prints what the long way prints, and is never taken where anything differs."""

from __future__ import annotations

import io
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import chdir, redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
from builders import Cli, Ran
from hypothesis import given
from hypothesis import strategies as st

from modelstow import ModelEnsurer
from modelstow.cas import BlobStore, Digest, leases
from modelstow.reconcile import snapshot
from modelstow.reconcile.cli.main import main
from modelstow.reconcile.cli.shortcut import _root, answer
from modelstow.reconcile.planning import verifier
from modelstow.reconcile.settings import default_root

MANIFEST = """schema = 1
[models."tiny"]
version = "1.0"
sources = ["src"]
default = "all"
[models."tiny".variants.all]
[models."tiny".variants.few]
include = ["config.json"]
[models."other@2"]
sources = ["src"]
[models."other@2".variants.only]
include = ["sub/**"]
"""
FILES = {"config.json": b"{}", "weights.bin": bytes(2000), "sub/deep/vocab.txt": b"words", "sub/empty": b""}
COMMANDS = [
    ["reconcile"],
    ["status"],
    ["status", "--check"],
    ["status", "tiny"],
    ["status", "tiny@1.0#few", "other"],
    ["plan"],
    ["plan", "--check"],
    ["plan", "tiny#few"],
    ["ensure", "--all"],
    ["ensure", "tiny", "other@2", "tiny#all"],
]


def short(cli: Cli, *args: str, **environ: str) -> Ran | None:
    """The answer of the short way alone; None where it was not taken, and then it printed nothing."""
    out = io.StringIO()
    with chdir(cli.folder), redirect_stdout(out):
        code = answer(list(args), cli.environ(**environ))
    assert code is not None or not out.getvalue()
    return None if code is None else Ran(code, out.getvalue(), "")


def long(cli: Cli, *args: str) -> Ran:
    """The answer of the whole command line in this process."""
    out, err = io.StringIO(), io.StringIO()
    with chdir(cli.folder), redirect_stdout(out), redirect_stderr(err):
        code = main(list(args), cli.environ())
    return Ran(code, out.getvalue(), err.getvalue())


@pytest.fixture
def synced(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> Cli:
    """A project that is in sync, with its snapshot. ctime cannot be set, so "lately" is made to mean: in the future."""
    for path, data in FILES.items():
        (cli.folder / "src" / path).parent.mkdir(parents=True, exist_ok=True)
        (cli.folder / "src" / path).write_bytes(data)
    (cli.folder / "models.toml").write_text(MANIFEST)
    monkeypatch.setattr(snapshot, "_RACY_NS", -(10**18))
    for command in ("lock", "reconcile", "reconcile"):
        assert long(cli, command).code == 0
    assert short(cli, "status") is not None
    return cli


@pytest.mark.parametrize("args", COMMANDS, ids=" ".join)
@pytest.mark.parametrize("form", [[], ["--json"]], ids=["text", "json"])
def test_the_short_way_prints_what_the_long_way_prints(synced: Cli, args: list[str], form: list[str]):
    """Byte for byte, with the same exit code."""
    (synced.root / "models/tiny@1.0/all/mine.txt").write_text("the user's")
    (synced.root / "models/tiny@1.0/all/sub/mine").mkdir()
    long(synced, "reconcile")

    first, second = short(synced, *args, *form), long(synced, *args, *form)

    assert first is not None
    assert (first.code, without_free(first.out)) == (second.code, without_free(second.out))
    assert second.err == ""


def without_free(text: str) -> str:
    """What is free on the disk may change at any moment."""
    return re.sub(r'"free_bytes": \d+', '"free_bytes": 0', text)


def test_every_place_of_an_option_is_understood_or_left_to_the_long_way(synced: Cli):
    """Nothing is guessed: what is not plain is not answered."""
    for args in (["status", "--root", str(synced.root)], ["status", f"--root={synced.root}", "-q"], ["status", "--locked"]):
        assert short(synced, *args) is not None
    lockfile = str(synced.folder / "models.lock")
    assert short(synced, "status", "--lock", lockfile) is not None
    for args in (
        ["status", "nothing"],
        ["status", "--root"],
        ["status", "--root="],
        ["status", "--rot", "x"],
        ["status", "-v"],
        ["status", "--progress", "json"],
        ["ensure"],
        ["ensure", "tiny", "--all"],
        ["ensure", "tiny", "--force"],
        ["ensure", "tiny", "--into", "x"],
        ["reconcile", "tiny"],
        ["reconcile", "--prune"],
        ["reconcile", "--watch", "1"],
        ["verify"],
        ["--version"],
        [],
    ):
        assert short(synced, *args) is None, args
    assert short(synced, "status", MODELSTOW_LINK_MODE="nonsense") is None
    assert short(synced, "status", MODELSTOW_LOG="x") is None


def edit_in_place(cli: Cli) -> None:
    path = cli.root / "models/tiny@1.0/all/weights.bin"
    os.chmod(path, 0o644)
    with path.open("r+b") as file:
        file.write(b"x")


def replace_with_the_same(cli: Cli) -> None:
    path = cli.root / "models/tiny@1.0/all/weights.bin"
    times = (path.stat().st_atime_ns, path.stat().st_mtime_ns)
    shutil.copyfile(path, cli.folder / "copy")
    os.utime(cli.folder / "copy", ns=times)
    os.replace(cli.folder / "copy", path)


def note_suspect(cli: Cli) -> None:
    BlobStore.open(cli.root).blobs.note_suspect(Digest.of(FILES["config.json"]))


def hold_lease(cli: Cli) -> None:
    leases.take(BlobStore.open(cli.root), doing="test", digests=[]).close()


def mark_verifying(cli: Cli) -> None:
    store = BlobStore.open(cli.root)
    (store.make_state_dir("verifying") / "0123-0").write_text("{}")


def relabel(cli: Cli) -> None:
    records = BlobStore.open(cli.root).trees
    record = records.read("models/tiny@1.0/all")
    assert record is not None
    records.rewrite(record)


def unlink_blob(cli: Cli) -> None:
    Path(BlobStore.open(cli.root).layout.blob(Digest.of(FILES["config.json"]))).unlink()


def swap_folder(cli: Cli) -> None:
    folder = cli.root / "models/tiny@1.0/all/sub"
    folder.rename(cli.folder / "elsewhere")
    folder.symlink_to(cli.folder / "elsewhere")


def relock(cli: Cli) -> None:
    (cli.folder / "models.lock").write_text((cli.folder / "models.lock").read_text().replace('"tiny@', '"tinz@'))


CHANGES: dict[str, Callable[[Cli], object]] = {
    "a write through a hardlink": edit_in_place,
    "another file with the same bytes and mtime": replace_with_the_same,
    "a user's file": lambda cli: (cli.root / "models/tiny@1.0/all/sub/deep/mine").touch(),
    "a user's folder": lambda cli: (cli.root / "models/tiny@1.0/all/mine").mkdir(),
    "a removed file": lambda cli: (cli.root / "models/other@2/only/sub/deep/vocab.txt").unlink(),
    "a removed empty file": lambda cli: (cli.root / "models/other@2/only/sub/empty").unlink(),
    "an empty file that was written to": lambda cli: (cli.root / "models/other@2/only/sub/empty").write_bytes(b"x"),
    "a removed tree": lambda cli: shutil.rmtree(cli.root / "models/other@2"),
    "a folder that became a symlink": swap_folder,
    "a missing blob": unlink_blob,
    "a suspect": note_suspect,
    "a lease": hold_lease,
    "a verification": mark_verifying,
    "another inventory": relabel,
    "a lost epoch": lambda cli: (cli.root / "state/epoch").unlink(),
    "another lockfile": relock,
    "a lost lockfile": lambda cli: (cli.folder / "models.lock").unlink(),
    "another manifest": lambda cli: (cli.folder / "models.toml").write_text(MANIFEST + "\n"),
    "a lost manifest": lambda cli: (cli.folder / "models.toml").unlink(),
    "a damaged snapshot": lambda cli: flip(next((cli.root / "state/snapshots").iterdir())),
}


def flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_whatever_changed_is_left_to_the_long_way(synced: Cli, change: Callable[[Cli], object]):
    """A cache is never believed where anything differs, for any of its commands over the whole lockfile."""
    change(synced)

    assert short(synced, "status") is None
    assert short(synced, "reconcile") is None
    assert short(synced, "ensure", "--all", "--json") is None


@pytest.mark.parametrize("mode", ["copy", "symlink"])
def test_files_with_bytes_of_their_own_are_looked_at_one_by_one(synced: Cli, mode: str):
    """No stat of a blob would show a write into a copy."""
    shutil.rmtree(synced.root / "models")
    for _ in range(2):
        assert long(synced, "reconcile", "--link-mode", mode).code == 0
    assert short(synced, "status") is not None
    path = synced.root / "models/tiny@1.0/all/weights.bin"
    if mode == "copy":
        os.chmod(path, 0o644)
        path.write_bytes(b"x" * 2000)
    else:
        path.unlink()
        path.symlink_to("nowhere")

    assert short(synced, "status") is None


def test_a_lockfile_that_was_written_again_with_the_same_bytes_is_read_and_believed(synced: Cli):
    """`git checkout` does that; the long way would find the same."""
    text = (synced.folder / "models.lock").read_bytes()
    (synced.folder / "models.lock").unlink()
    (synced.folder / "models.lock").write_bytes(text)

    assert short(synced, "status") is not None


def test_one_selector_asks_for_its_own_files_alone(synced: Cli):
    """What is wrong with another tree does not concern it; what is wrong with its own does."""
    (synced.root / "models/other@2/only/sub/deep/vocab.txt").unlink()

    assert short(synced, "status", "tiny#few") is not None
    assert short(synced, "status", "other") is None and short(synced, "status") is None


def test_what_changed_just_before_an_observation_gets_no_snapshot(synced: Cli, monkeypatch: pytest.MonkeyPatch):
    """A second change could carry the same time as the first: git's racy rule."""
    monkeypatch.setattr(snapshot, "_RACY_NS", 10**18)
    before = next((synced.root / "state/snapshots").iterdir()).stat().st_ino

    long(synced, "reconcile")

    assert next((synced.root / "state/snapshots").iterdir()).stat().st_ino == before


def test_a_store_on_a_network_file_system_gets_no_snapshot(synced: Cli, monkeypatch: pytest.MonkeyPatch):
    """Its server may change what is there without a trace in its times."""
    shutil.rmtree(synced.root / "state/snapshots")
    monkeypatch.setattr("modelstow.cas.syscalls.is_local", lambda fd: False)

    assert long(synced, "reconcile").code == 0

    assert not (synced.root / "state/snapshots").exists()


def test_a_lockfile_that_was_replaced_since_it_was_read_gets_no_snapshot(synced: Cli):
    """A program that keeps its ModelEnsurer must not say of a newer lockfile that it is in sync."""
    ensurer = ModelEnsurer.open(root=synced.root, lockfile=synced.folder / "models.lock")
    (synced.folder / "models.toml").write_text(
        MANIFEST + '[models."new"]\nversion = "1"\nsources = ["src"]\n[models."new".variants.v]\n'
    )
    assert long(synced, "lock").code == 0

    ensurer.reconcile()

    assert short(synced, "status") is None and "NOT_PRESENT" in long(synced, "status").out


def test_an_unpinned_tree_that_no_lockfile_names_is_seen(synced: Cli):
    """Pins decide what the next reconcile removes."""
    assert long(synced, "pin", "other@2").code == 0
    (synced.folder / "models.toml").write_text(MANIFEST.partition('[models."other@2"]')[0])
    for command in ("lock", "reconcile", "reconcile"):
        assert long(synced, command).code == 0
    assert short(synced, "plan", "--check") is not None

    assert long(synced, "unpin", "other@2#only").code == 0

    assert short(synced, "plan", "--check") is None and long(synced, "plan", "--check").code == 3


def test_a_selector_that_several_versions_fit_is_left_to_the_long_way(synced: Cli):
    """Which refuses it, whether or not one of them has the variant or a default."""
    more = '[models."tiny@3"]\nsources = ["src"]\n[models."tiny@3".variants.all]\n[models."tiny@3".variants.own]\n'
    (synced.folder / "models.toml").write_text(MANIFEST + more)
    for command in ("lock", "reconcile", "reconcile"):
        assert long(synced, command).code == 0

    for selector in ("tiny", "tiny#own", "tiny#few"):
        assert short(synced, "ensure", selector) is None and long(synced, "ensure", selector).code == 2
    assert short(synced, "ensure", "tiny@3#own") is not None


def test_a_time_of_whole_seconds_is_settled_a_second_later(synced: Cli, monkeypatch: pytest.MonkeyPatch):
    """Some file systems keep no fractions: within the same second nothing would show a second change."""
    monkeypatch.undo()
    second = 10**9

    snapshot._require_settled([5 * second], 6 * second + snapshot._RACY_NS + 1)
    with pytest.raises(snapshot.Unsettled):
        snapshot._require_settled([5 * second], 6 * second)
    snapshot._require_settled([5 * second + 1], 6 * second)


def test_a_current_folder_that_is_gone_is_left_to_the_long_way(synced: Cli, tmp_path: Path):
    """Which says so."""
    gone = tmp_path / "gone"
    gone.mkdir()
    with chdir(gone):
        gone.rmdir()
        assert answer(["status"], synced.environ()) is None


@pytest.mark.parametrize("manifest", [MANIFEST.replace('"1.0"', '"1.1"'), "no TOML ["], ids=["newer", "unreadable"])
def test_a_stale_lockfile_gets_no_snapshot_so_that_each_command_warns_and_locked_refuses(synced: Cli, manifest: str):
    """What the long way has to say cannot be said by the short one."""
    (synced.folder / "models.toml").write_text(manifest)
    assert "warning" in long(synced, "reconcile").err

    assert short(synced, "status") is None and short(synced, "status", "--locked") is None
    assert "warning" in long(synced, "status").err and long(synced, "status", "--locked").code != 0


def test_only_reconcile_writes_a_snapshot(synced: Cli):
    """`status` and `plan` write nothing at all."""
    shutil.rmtree(synced.root / "state/snapshots")
    for args in (["status"], ["plan"], ["ensure", "tiny"]):
        long(synced, *args)

    assert not (synced.root / "state/snapshots").exists()


def test_the_use_of_a_tree_is_recorded_on_the_short_way_too(synced: Cli):
    """Else what is used every day would be evicted first."""
    marks = {path: path.stat().st_mtime_ns for path in (synced.root / "state/used").iterdir()}
    for path in marks:
        os.utime(path, (1, 1))

    assert short(synced, "ensure", "tiny#few") is not None

    assert sorted(path.stat().st_mtime != 1 for path in marks) == [False, False, True]


def test_a_verification_that_runs_forbids_the_short_way_and_its_end_allows_it_again(synced: Cli):
    """Its trees are VERIFYING meanwhile."""
    store = BlobStore.open(synced.root)
    with verifier._marked(store, []):
        pass
    assert short(synced, "status") is not None


def test_real_processes_take_the_short_way(synced: Cli):
    """Over fork and the module's entry point, with nothing heavy loaded."""
    code = (
        "import sys\n"
        "from modelstow.reconcile.cli.console import console\n"
        "sys.argv = ['modelstow', 'status', '--json']\n"
        "try:\n    console()\n"
        "finally:\n"
        "    heavy = {'argparse', 'dataclasses', 'typing', 'pathlib', 're', 'hashlib', 'enum'} & sys.modules.keys()\n"
        "    print(sorted(heavy - {'re', 'enum'}), file=sys.stderr)\n"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-c", code],
        cwd=synced.folder,
        env=synced.environ(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0 and '"COMPLETE"' in done.stdout, done.stderr
    assert done.stderr.strip() == "[]"


def test_the_default_root_is_the_same_on_both_ways(synced: Cli):
    """The short way does without the library that knows other systems."""
    for environ in (
        {"HOME": "/home/me"},
        {"HOME": "/home/me", "XDG_DATA_HOME": "/data"},
        {"MODELS_ROOT": "/m", "HOME": "/h"},
    ):
        with pytest.MonkeyPatch.context() as patch:
            patch.delenv("XDG_DATA_HOME", raising=False)
            patch.setenv("HOME", environ["HOME"])
            assert _root(None, environ) == str(default_root(environ))
    assert _root(None, {}) is None


def taken(cli: Cli) -> snapshot.Snapshot:
    found = snapshot.read(str(cli.root), str(cli.folder / "models.lock"))
    assert found is not None
    return found


def test_a_snapshot_reads_back_as_it_was_written(synced: Cli):
    """Every name and every column."""
    found = taken(synced)

    again = snapshot.decode(snapshot.encode(found))

    for name in snapshot.Snapshot.__slots__:
        if name != "trees":
            assert getattr(again, name) == getattr(found, name), name
    for one, other in zip(again.trees, found.trees, strict=True):
        assert all(getattr(one, name) == getattr(other, name) for name in snapshot.Tree.__slots__)


@given(st.data())
def test_no_altered_snapshot_is_believed(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject):
    """A flipped bit, a lost tail, anything else: no snapshot, and no other error."""
    made = snapshot.Snapshot("/r", "/l", "", "00")
    made.trees.append(snapshot.Tree("i", "m@1", "v", "/r/models/m@1/v", default=True, extra=["x"]))
    raw = bytearray(snapshot.encode(made))
    if data.draw(st.booleans()):
        raw[data.draw(st.integers(0, len(raw) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    else:
        del raw[data.draw(st.integers(0, len(raw) - 1)) :]

    with pytest.raises(ValueError):
        snapshot.decode(bytes(raw))


def test_another_users_snapshot_is_not_believed(synced: Cli, monkeypatch: pytest.MonkeyPatch):
    """In a shared store each member may write to the folder."""
    monkeypatch.setattr(os, "geteuid", lambda: 4242)
    path = next((synced.root / "state/snapshots").iterdir())
    if os.stat(path).st_uid == 0:
        os.chown(path, 4243, -1)

    assert snapshot.read(str(synced.root), str(synced.folder / "models.lock")) is None
