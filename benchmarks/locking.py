"""How long does it take to lock a folder of small files, and to read the lockfile afterwards?

``modelstow lock`` of a folder of 10,000 and of 100,000 different small files, beside ``git add`` of the same:
both read every file, name it by its content and keep it, ours durably. Every repeat begins without a store and without a
repository, in a new folder. Then the lockfile is read five times by ``modelstow``, which checks it, and by ``json.loads``.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

from .fixtures import FOLDERS
from .measure import (
    CLI,
    Contender,
    Options,
    Row,
    Sample,
    absent,
    command,
    contest,
    environment,
    peak,
    plain,
    rows,
    timed,
    tool,
)

QUESTION = "locking"
_MANIFEST = 'schema = 1\n[models.bench]\nversion = "1"\nsources = ["{source}"]\n[models.bench.variants.all]\n'
_READ = (
    "import gc, sys; gc.set_threshold(200_000, 50, 50)\n"  # as the command line does
    "from pathlib import Path\n"
    "from modelstow.reconcile.desired import lockfile\n"
    "for _ in range(5): lockfile.read(Path(sys.argv[1]))\n"
)
_LOADS = (
    "import gc, json, sys; gc.set_threshold(200_000, 50, 50)\n"
    "for _ in range(5): json.loads(open(sys.argv[1], 'rb').read())\n"
)


def run(options: Options) -> list[Row]:
    """Ask it at each of *options.files*."""
    found: list[Row] = []
    for count in options.files:
        found += _at(count, options)
    return found


def _at(count: int, options: Options) -> list[Row]:
    folder = options.folder(f"{QUESTION}-{count}")
    source = folder / "source"
    for number in range(count):
        path = source / f"part{number % FOLDERS:03d}/file{number:06d}.bin"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"small file number %d\n" % number)
    label = f"{count:,} files: "
    contenders = [_locking(folder, source), *_adding(folder, source)]
    samples = contest(contenders, options.repeats, warm=False, settle=True)
    base = next((each.name for each in contenders if each.name == "git add"), "modelstow lock")
    found = rows(QUESTION, contenders, samples, ratio_to=base, label=label)
    if tool("git") is None:
        found.append(absent(QUESTION, f"{label}git add", "git is not installed"))
    highest = peak(samples["modelstow lock"]) / 1e6
    found.append(Row(question=QUESTION, row=f"{label}peak memory of lock", value=highest, unit="MB"))
    return [*found, *_reading(folder, label, options)]


def _locking(folder: Path, source: Path) -> Contender:
    def once(repeat: int) -> Sample:
        project = folder / f"project-{repeat}"
        project.mkdir()
        (project / "models.toml").write_text(_MANIFEST.format(source=source))
        return timed([*CLI, "lock"], cwd=project, env=environment(project / "root"))

    return Contender("modelstow lock", once, "every blob is durable")


def _adding(folder: Path, source: Path) -> Iterator[Contender]:
    if tool("git") is None:
        return

    def once(repeat: int) -> Sample:
        env = environment(folder) | {"GIT_DIR": str(folder / f"git-{repeat}"), "GIT_WORK_TREE": str(source)}
        plain(["git", "init", "-q"], cwd=source, env=env)
        return timed(["git", "add", "-A"], cwd=source, env=env)

    yield Contender("git add", once, "git does not sync loose objects by default")


def _reading(folder: Path, label: str, options: Options) -> list[Row]:
    lockfile, env = str(folder / "project-0/models.lock"), {**os.environ}
    contenders = [
        command("reading the lockfile", [sys.executable, "-c", _READ, lockfile], cwd=folder, env=env),
        command("json.loads of it", [sys.executable, "-c", _LOADS, lockfile], cwd=folder, env=env),
    ]
    samples = contest(contenders, options.repeats)
    return rows(QUESTION, contenders, samples, ratio_to="json.loads of it", label=f"{label}5 times: ")
