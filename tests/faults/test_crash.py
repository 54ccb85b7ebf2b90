"""Killed at a sample of its writing system calls, modelstow leaves nothing corrupt, and running again finishes.

With strace the kill comes on entry of the N-th call of a thread, for N spread over all that a whole run makes; without
it, after random delays. MODELSTOW_CRASH_POINTS sets the size of the sample.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import publishing
import pytest
from builders import PATIENCE_S, CalledCli, Cli, assert_sound, blobs_of, leftovers, lock_of, some_bytes, tree_of, write_lock

pytestmark = pytest.mark.slow

MOST_OF_A_NAME = 60
POINTS = int(os.environ.get("MODELSTOW_CRASH_POINTS", "10"))
WRITING = (
    "write,pwrite64,rename,renameat,renameat2,link,linkat,unlink,unlinkat,rmdir,mkdir,mkdirat,"
    "fsync,fdatasync,ftruncate,fchmod,chmod,fchmodat,utimensat,symlinkat,copy_file_range"
)
BIG, BIG2 = some_bytes(9_000_000, 1), some_bytes(9_100_000, 2)
OLD = {"config.json": b"{}", "model.bin": BIG, "deep/vocab.txt": b"a b c", "empty": b""}
NEW = {"config.json": b'{"v": 2}', "model.bin": BIG2, "deep/vocab.txt": b"a b c", "deep/more.txt": b"d"}
OTHER = {"other.bin": some_bytes(2_000_000, 3), "deep/vocab.txt": b"a b c"}


def can_strace() -> bool:
    """Whether strace is here and may trace."""
    if shutil.which("strace") is None:
        return False
    done = subprocess.run(["strace", "-f", "-qq", "-o", os.devnull, "true"], capture_output=True)
    return done.returncode == 0


STRACE = can_strace()


@dataclass(frozen=True)
class Story:
    """A command to be killed: how the world is before it, what it may leave, and what running it again must reach."""

    prepare: Callable[[Cli], None]
    command: tuple[str, ...]
    trees: dict[str, tuple[dict[str, bytes], ...]]  # tree -> the contents that may be seen at any moment
    reached: dict[str, dict[str, bytes]]  # tree -> content in the end


def lock_with(cli: Cli, models: dict[str, dict[str, dict[str, bytes]]]) -> None:
    """Write a lockfile and the folder that its bytes come from."""
    for key, variants in models.items():
        for variant, files in variants.items():
            for path, data in files.items():
                target = cli.folder / "src" / key / variant / path
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(data)
    # Every blob has its own locator, since variants call different bytes by the same path.
    lock = lock_of(models)
    from dataclasses import replace

    from modelstow.cas import Digest

    where = {
        Digest.of(data): f"src/{key}/{variant}/{path}"
        for key, variants in models.items()
        for variant, files in variants.items()
        for path, data in files.items()
    }
    blobs = {digest: blob._replace(urls=(where[digest],)) for digest, blob in lock.blobs.items()}
    write_lock(cli.folder, replace(lock, blobs=blobs))


def nothing_yet(cli: Cli) -> None:
    lock_with(cli, {"m@1": {"a": OLD, "b": OTHER}})


def old_version_in_place(cli: Cli) -> None:
    lock_with(cli, {"m@1": {"a": OLD}, "n@1": {"b": OTHER}})
    cli.ok("reconcile")
    (cli.root / "models/m@1/a/mine.txt").write_text("the user's")
    lock_with(cli, {"m@1": {"a": NEW}})


def damaged(cli: Cli) -> None:
    lock_with(cli, {"m@1": {"a": OLD}})
    cli.ok("reconcile")
    victim = cli.root / "models/m@1/a/model.bin"
    victim.chmod(0o644)
    with open(victim, "r+b") as file:
        file.write(b"damage")


def garbage(cli: Cli) -> None:
    lock_with(cli, {"m@1": {"a": OLD}, "n@1": {"b": OTHER}})
    cli.ok("reconcile")
    lock_with(cli, {"n@1": {"b": OTHER}})
    cli.ok("reconcile")


MINE = {"mine.txt": b"the user's"}
HURT = OLD | {"model.bin": b"damage" + BIG[6:]}
STORIES = {
    "a first reconcile": Story(
        nothing_yet, ("reconcile",), {"m@1/a": (OLD,), "m@1/b": (OTHER,)}, {"m@1/a": OLD, "m@1/b": OTHER}
    ),
    "an upgrade that removes a tree": Story(
        old_version_in_place,
        ("reconcile",),
        {"m@1/a": (OLD | MINE, NEW | MINE, NEW), "n@1/b": (OTHER,)},
        {"m@1/a": NEW | MINE},
    ),
    "a repair": Story(damaged, ("ensure", "m"), {"m@1/a": (HURT, OLD)}, {"m@1/a": OLD}),
    "a repair by verify": Story(damaged, ("verify", "--repair"), {"m@1/a": (HURT, OLD)}, {"m@1/a": OLD}),
    "a garbage collection": Story(garbage, ("gc",), {"n@1/b": (OTHER,)}, {"n@1/b": OTHER}),
}


def again(template: Path, world: Path) -> Cli:
    """The same world once more: hardlinks and all, and at the same place, since lockfiles are known by their path."""
    if world.exists():
        shutil.rmtree(world)
    subprocess.run(["cp", "-a", template, world], check=True)
    return Cli(world)


def calls_of(cli: Cli, command: tuple[str, ...]) -> list[tuple[str, int]]:
    """Every writing call of a whole run: its name, and which it is of that name in the thread that makes most of them."""
    log = cli.folder / "calls"
    argv = ["strace", "-ff", "-qq", "-o", str(log), "-e", f"trace={WRITING}", *cli.argv(*command)]
    subprocess.run(argv, cwd=cli.folder, env=cli.environ(), check=True, capture_output=True)
    most: Counter[str] = Counter()
    for path in cli.folder.glob("calls*"):
        most |= Counter(line.partition("(")[0] for line in path.read_text().splitlines() if "(" in line)
    # The folders of a new store are hundreds of calls that are all alike.
    return [(name, number) for name in sorted(most) for number in range(1, min(most[name], MOST_OF_A_NAME) + 1)]


def kill_at(cli: Cli, command: tuple[str, ...], name: str, number: int) -> bool:
    """Run and kill on entry of a thread's N-th call of one name; False if the run ended before."""
    # One name at a time: strace counts each name apart, so that a kill at the N-th of many names hits the frequent ones.
    argv = ["strace", "-f", "-qq", "-o", os.devnull, "-e", f"trace={name}"]
    argv += ["-e", f"inject={name}:signal=SIGKILL:when={number}", *cli.argv(*command)]
    done = subprocess.run(argv, cwd=cli.folder, env=cli.environ(), capture_output=True)
    return done.returncode != 0


def kill_after(cli: Cli, command: tuple[str, ...], seconds: float) -> bool:
    """Run and kill after a while; False if the run ended before."""
    running = cli.start(*command)
    try:
        running.wait(seconds)
    except subprocess.TimeoutExpired:
        running.send_signal(signal.SIGKILL)
    running.communicate()
    return running.returncode != 0


def assert_nothing_corrupt(cli: Cli, story: Story) -> None:
    """Every visible blob equals its name; every visible tree is one of the whole ones."""
    for name, path in blobs_of(cli.root).items():
        from modelstow.cas import Digest

        data = path.read_bytes()
        if data != HURT["model.bin"]:  # the damage was done before, through a hardlink
            assert Digest.of(data).hex == name
    for tree, allowed in story.trees.items():
        path = cli.root / "models" / tree
        if path.is_dir():
            # A tree that is repaired file by file may hold the next file under a name that no path of a lockfile can have.
            seen = {
                name: data for name, data in tree_of(path).items() if not name.rpartition("/")[2].startswith(".modelstow-")
            }
            assert seen in allowed, f"{tree} is a mixture"


@pytest.mark.parametrize("name", STORIES)
def test_a_kill_leaves_nothing_corrupt_and_running_again_finishes(tmp_path: Path, name: str):
    """At each of a sample of points: blobs equal their names, trees are whole, and the next run reaches the end."""
    story = STORIES[name]
    template, world = tmp_path / "template", tmp_path / "world"
    world.mkdir()
    story.prepare(Cli(world))
    world.rename(template)
    began = time.monotonic()
    calls = calls_of(again(template, world), story.command) if STRACE else []
    took = time.monotonic() - began
    rng = random.Random(name)
    points = rng.sample(calls, min(POINTS, len(calls))) if STRACE else [("", took * rng.random()) for _ in range(POINTS)]
    print(f"{name}: {len(calls)} calls, points {points}")

    for call, point in points:
        cli = again(template, world)
        killed = kill_at(cli, story.command, call, int(point)) if STRACE else kill_after(cli, story.command, point)

        if killed and (cli.root / "modelstow.json").exists():
            assert_nothing_corrupt(cli, story)
        survivor = CalledCli(cli.folder)
        survivor.ok(*story.command)
        survivor.ok("status", "--check")

        for tree, content in story.reached.items():
            assert tree_of(cli.root / "models" / tree) == content
        gone = story.trees.keys() - story.reached.keys()
        assert not [tree for tree in gone if (cli.root / "models" / tree).exists()]
        assert leftovers(cli.root) == [], f"killed at {call} number {point}"
        assert_sound(cli.root)


@pytest.mark.skipif(not STRACE, reason="needs strace")
def test_a_kill_while_an_outside_folder_is_mended_leaves_no_file_of_ours(tmp_path: Path):
    """The same command again finishes it, and none of our temporary names is taken for the user's file (B22)."""
    template, world = tmp_path / "template", tmp_path / "world"
    world.mkdir()
    lock_with(Cli(world), {"m@1": {"a": OLD}})
    (world / "out").mkdir()
    (world / "out/config.json").write_bytes(b"the user's config")
    (world / "out/mine.txt").write_bytes(b"the user's")
    world.rename(template)
    command = ("ensure", "m", "--into", "out")
    names = ("link", "linkat", "rename", "renameat", "unlink", "unlinkat", "utimensat", "fsync", "mkdirat")
    calls = [(name, number) for name, number in calls_of(again(template, world), command) if name in names]
    last = [(name, number) for name, number in calls if name in names[:6]]
    points = {*last[-12:], *random.Random("into").sample(calls, min(POINTS, len(calls)))}

    for call, point in sorted(points):
        cli = again(template, world)
        kill_at(cli, command, call, point)
        survivor = CalledCli(cli.folder)
        survivor.ok(*command)

        assert tree_of(world / "out") == OLD | MINE, f"killed at {call} number {point}"
        kept = [path.read_bytes() for path in (cli.root / "quarantine").rglob("*") if path.is_file()]
        assert kept == [b"the user's config"], f"killed at {call} number {point}"
        assert not [path for path in world.iterdir() if path.name.startswith(".")]
        assert leftovers(cli.root) == []


class Publishing(Cli):
    """The program that publishes a tree with entries of every kind."""

    def argv(self, *args: str | Path) -> list[str]:
        return [sys.executable, str(Path(publishing.__file__)), str(self.root), *map(str, args)]


@pytest.mark.skipif(not STRACE, reason="needs strace")
@pytest.mark.parametrize("steps", [("1",), ("1", "2"), ("1", "damage", "1"), ("1", "-")], ids=" to ".join)
def test_a_kill_while_a_tree_of_all_kinds_changes_loses_nothing(tmp_path: Path, steps: tuple[str, ...]):
    """Whatever was done of the last step, doing it again finishes it, and the user's file is there."""
    template, world = tmp_path / "template", tmp_path / "world"
    world.mkdir()
    tree = world / "root" / publishing.KEY.tree
    for step in steps[:-1]:
        if step == "damage":  # which is repaired path by path
            (tree / "refs/main").write_bytes(b"9999")
            (tree / "snapshots/1111/model.bin").unlink()
        else:
            publishing.publish(world / "root", publishing.VERSIONS[step])
    mine = {"mine.txt": b"the user's"} if steps[:-1] else {}
    for path, data in mine.items():
        (tree / path).write_bytes(data)
    world.rename(template)
    last = steps[-1]
    calls = calls_of(Publishing(again(template, world).folder), (last,))
    points = random.Random("".join(steps)).sample(calls, min(POINTS, len(calls)))
    wanted = publishing.VERSIONS.get(last, {})

    for call, point in points:
        cli = Publishing(again(template, world).folder)
        kill_at(cli, (last,), call, point)
        cli.ok(last)

        assert publishing.content_of(cli.root) == {**publishing.bytes_of(wanted), **mine}, (
            f"killed at {call} number {point}"
        )
        if wanted:
            assert publishing.state_of(cli.root, wanted) == ("COMPLETE", [])
        left = [path for path in leftovers(cli.root) if not path.startswith(("partial/", "state/"))]
        assert left == [], f"killed at {call} number {point}"


def test_a_kill_in_mid_transfer_costs_only_the_piece_in_flight(cli: Cli):
    """What was finished is found again: the origin sends the rest and at most one piece twice."""
    from origin import Origin, gate_of

    data = some_bytes(40_000_000, 9)
    with Origin({"m/model.bin": data}) as origin:
        write_lock(cli.folder, lock_of({"m@1": {"v": {"model.bin": data}}}, sources=[f"{origin.url}/m"]))
        gate = gate_of(origin, "m/model.bin", after=36_000_000)
        running = cli.start("ensure", "m", "--connections", "1")
        assert origin.reached.wait(PATIENCE_S)
        running.kill()
        running.communicate()
        gate.set()
        sent = origin.sent()

        done = cli.ok("ensure", "m", "--json").json

        assert done["summary"]["resumed_bytes"] >= 16 << 20
        assert done["summary"]["resumed_bytes"] + done["summary"]["fetched_bytes"] == len(data)
        assert sent + done["summary"]["fetched_bytes"] <= len(data) + (16 << 20)
    assert leftovers(cli.root) == []


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_a_silent_transfer_and_keeps_what_was_fetched(cli: Cli, number: signal.Signals, code: int):
    """It does not wait for the server, its exit code tells which signal it was, and the next run continues."""
    from origin import Origin, gate_of

    data = some_bytes(40_000_000, 9)
    with Origin({"m/model.bin": data}) as origin:
        write_lock(cli.folder, lock_of({"m@1": {"v": {"model.bin": data}}}, sources=[f"{origin.url}/m"]))
        # Sockets hold ten megabytes that were sent and not yet read.
        gate = gate_of(origin, "m/model.bin", after=34_000_000)
        running = cli.start("ensure", "m", "--json", "--connections", "1", endless_reads=True)
        assert origin.reached.wait(PATIENCE_S)
        running.send_signal(number)
        out, err = running.communicate(timeout=PATIENCE_S)  # the gate is still shut and no read times out
        gate.set()

        assert running.returncode == code
        assert '"ok": false' in out and "Traceback" not in err
        assert cli.ok("ensure", "m", "--json").json["summary"]["resumed_bytes"] >= 8 << 20
