"""What does it cost to find that there is nothing to do, beside git, and does it touch no content?

A lockfile of 10,000 and one of 100,000 tiny files in 256 folders, reconciled; then ``reconcile`` again as a whole process,
beside ``git status`` and ``git diff-files`` on a checked-in copy of the same tree. ``strace`` counts, in a run of its own,
the stats and opens of blobs and of files of the tree; ``-X importtime`` shows which libraries a no-op loads.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from .fixtures import World, many_models, small_files
from .measure import CLI, Contender, Options, Row, absent, command, contest, environment, peak, plain, rows, tool

QUESTION = "noop"
HEAVY = ("requests", "urllib3", "boto3", "botocore", "rich", "tomlkit", "pathspec")
_CALLS = "open,openat,newfstatat,stat,lstat,statx,fstatat64"
_HEX = 64  # letters in a blob's name
_PATH = re.compile(r'"((?:[^"\\]|\\.)*)"')


def run(options: Options) -> list[Row]:
    """Ask it at each of *options.files*, then of start-up."""
    found: list[Row] = []
    for count in options.files:
        found += _at(count, options)
    return [*found, *_of_many_models(options), *_start_up(options)]


def _at(count: int, options: Options) -> list[Row]:
    folder = options.folder(f"{QUESTION}-{count}")
    world = small_files(folder, count)
    for _ in range(2):  # the second finds nothing to do and takes the snapshot
        plain([*CLI, "reconcile"], cwd=folder, env=world.env)
    label = f"{count:,} files: "
    contenders = [
        command("modelstow reconcile", [*CLI, "reconcile", "--json"], cwd=folder, env=world.env),
        command("modelstow status", [*CLI, "status", "--json"], cwd=folder, env=world.env),
        *_git(world),
    ]
    samples = contest(contenders, options.repeats)
    base = next((each.name for each in contenders if each.name == "git status"), "modelstow reconcile")
    highest = peak(samples["modelstow reconcile"]) / 1e6
    memory = Row(question=QUESTION, row=f"{label}peak memory of reconcile", value=highest, unit="MB")
    found = rows(QUESTION, contenders, samples, ratio_to=base, label=label)
    if tool("git") is None:
        found.append(absent(QUESTION, f"{label}git status", "git is not installed"))
    return [*found, memory, *_calls(world, label, count)]


def _git(world: World) -> Iterator[Contender]:
    """A repository with the same files at the same paths, its index freshly written."""
    if tool("git") is None:
        return
    copy = world.folder / "git"
    plain(["cp", "-r", world.tree, copy], cwd=world.folder, env=world.env)
    git = ["git", "-c", "core.looseCompression=0", "-c", "core.fsync=none", "-c", "gc.auto=0"]
    for argv in (["init", "-q"], ["add", "-A"], ["status", "--porcelain"]):
        plain([*git, *argv], cwd=copy, env=world.env)
    yield command("git status", ["git", "status", "--porcelain"], cwd=copy, env=world.env, note="also looks for new files")
    yield command("git diff-files", ["git", "diff-files"], cwd=copy, env=world.env)


# ---- what it touches


def _calls(world: World, label: str, count: int) -> list[Row]:
    stats_name, opens_name = f"{label}stats of blobs and files, each file", f"{label}contents opened"
    if tool("strace") is None:
        return [absent(QUESTION, name, "strace is not installed") for name in (stats_name, opens_name)]
    trace = world.folder / "trace"
    argv = ["strace", "-f", "-s", "4096", "-e", f"trace={_CALLS}", "-o", trace, *CLI, "reconcile", "--json"]
    plain(argv, cwd=world.folder, env=world.env)
    stats, opened = _counted(trace, world.root)
    return [
        Row(question=QUESTION, row=stats_name, value=stats / count, unit="", note=f"{stats:,} calls, by strace"),
        Row(question=QUESTION, row=opens_name, value=opened, unit="", note="opens of blobs and tree files, by strace"),
    ]


def _counted(trace: Path, root: Path) -> tuple[int, int]:
    """Stats and opens in a trace that name a blob or a file of a tree; names of folders are shorter than those here."""
    inside = f"{root}/blobs/"
    stats = opened = 0
    with open(trace) as file:
        for line in file:
            path = _PATH.search(line)
            if path is None or "O_DIRECTORY" in line:
                continue
            name = path[1].rpartition("/")[2]
            content = name.endswith(".bin") or (len(name) == _HEX and (path[1].startswith(inside) or path[1][0] != "/"))
            if "open" in line.partition("(")[0]:
                opened += content
            else:
                stats += content
    return stats, opened


# ---- one of many models


def _of_many_models(options: Options) -> list[Row]:
    """``status`` of one model out of as many as the smallest tree has files, at most 1,000, and of the same model alone."""
    many = min(1_000, *options.files)
    contenders = []
    for models in (many, 1):
        folder = options.folder(f"{QUESTION}-models-{models}")
        world = many_models(folder, models, files=10)
        for _ in range(2):  # the second finds nothing to do and takes the snapshot
            plain([*CLI, "reconcile"], cwd=folder, env=world.env)
        name = f"status of one of {models:,} models" if models > 1 else "status of one model alone"
        contenders.append(command(name, [*CLI, "status", "bench000"], cwd=folder, env=world.env))
    samples = contest(contenders, options.repeats)
    return rows(QUESTION, contenders, samples, ratio_to=contenders[-1].name)


# ---- start-up


def _start_up(options: Options) -> list[Row]:
    folder = options.folder(f"{QUESTION}-1")
    world = small_files(folder, 1)
    for _ in range(2):
        plain([*CLI, "reconcile"], cwd=folder, env=world.env)
    env = environment(world.root)
    contenders = [
        command("python -c pass", [sys.executable, "-c", "pass"], cwd=folder, env=env, note="the limit"),
        command("modelstow --version", [*CLI, "--version"], cwd=folder, env=env),
        command("modelstow --help", [*CLI, "--help"], cwd=folder, env=env),
        command("modelstow status", [*CLI, "status"], cwd=folder, env=env),
        command("modelstow reconcile", [*CLI, "reconcile"], cwd=folder, env=env),
    ]
    samples = contest(contenders, max(options.repeats, 3))
    found = rows(QUESTION, contenders, samples, ratio_to="python -c pass", label="1 file: ")
    loaded = _imports(world)
    heavy = [name for name in HEAVY if name in loaded]
    note = ", ".join(heavy) or f"none of {', '.join(HEAVY)}"
    name = "1 file: heavy libraries that a no-op reconcile imports"
    return [*found, Row(question=QUESTION, row=name, value=len(heavy), unit="", note=note)]


def _imports(world: World) -> frozenset[str]:
    """The top-level names that a no-op imports."""
    argv = [sys.executable, "-X", "importtime", "-m", "modelstow", "reconcile", "--json"]
    done = subprocess.run(argv, cwd=world.folder, env=world.env, capture_output=True, text=True, check=True)
    names = (line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:"))
    return frozenset(name.partition(".")[0] for name in names)
