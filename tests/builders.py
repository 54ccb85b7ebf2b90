"""Small worlds for tests: blobs with real digests, lockfiles, ensurers that never sleep, and the real command line."""

from __future__ import annotations

import io
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import chdir, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

from modelstow import ModelEnsurer
from modelstow.backends import Source
from modelstow.backends.memory import MemorySource
from modelstow.cas import Digest
from modelstow.cas.chunking import DEFAULT
from modelstow.reconcile.cli.main import main
from modelstow.reconcile.desired.lockfile import LockedBlob, LockedModel, LockedVariant, Lockfile
from modelstow.reconcile.transfer.retry import RetryPolicy, RetrySchedule

IMPATIENT = RetryPolicy(transient=RetrySchedule(attempts=3), rate_limit=RetrySchedule(attempts=3), retry_after_cap_s=0.0)
"""Retries without a pause, so that no test sleeps."""
PIECE = DEFAULT.piece_bytes
piece_count, piece_range = DEFAULT.count, DEFAULT.range
PATIENCE_S = 120.0
"""How long a test waits for an event that is certain to come: only a hang takes longer, however busy the machine is."""
_ENDLESS_READS = (
    "import modelstow.backends.http.client as client\n"
    "client.READ_TIMEOUT_S = 3600.0\n"
    "from modelstow.reconcile.cli.console import console\n"
    "console()\n"
)


def wait_until(holds: Callable[[], bool], *, running: Callable[[], bool] = lambda: True) -> None:
    """Poll for what no event reports, such as a file that another process writes, while *running* is true."""
    deadline = time.monotonic() + PATIENCE_S
    while not holds():
        assert running(), "the work ended before the condition held"
        assert time.monotonic() < deadline, "the condition never held"
        time.sleep(0.005)


def as_user(uid: int, work: Callable[[], object]) -> str:
    """Do *work* in a child process of another user, and of no group but 100; the ``repr`` of its result or error."""
    reading, writing = os.pipe()
    if (child := os.fork()) == 0:
        try:
            os.setgroups([])
            os.setgid(100)
            os.setuid(uid)
            try:
                text = repr(work())
            except BaseException as error:
                text = repr(error)
            os.write(writing, text.encode()[:60_000])
        finally:
            os._exit(0)
    os.close(writing)
    with open(reading, "rb") as file:
        text = file.read().decode()
    os.waitpid(child, 0)
    return text


@contextmanager
def open_folder() -> Iterator[Path]:
    """A temporary folder that every user may enter, also where those of pytest are its user's alone."""
    folder = Path(tempfile.mkdtemp(dir=in_memory()))
    os.chmod(folder, 0o755)
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def in_memory() -> str | None:
    """A folder of a file system in memory, where a sync costs nothing; None where there is none to write to."""
    return "/dev/shm" if os.path.isdir("/dev/shm") and os.access("/dev/shm", os.W_OK) else None


def some_bytes(size: int, seed: int = 0) -> bytes:
    """Bytes that are nowhere alike, the same for the same seed."""
    return random.Random(seed).randbytes(size)


def lock_of(
    models: Mapping[str, Mapping[str, Mapping[str, bytes]]],
    sources: Iterable[str] = ("mem://origin/m",),
    *,
    default: str | None = None,
) -> Lockfile:
    """A lockfile of ``{"name@version": {"variant": {"path": content}}}``; every source has every path."""
    blobs: dict[Digest, LockedBlob] = {}
    locked = {}
    for key, variants in models.items():
        rows = {}
        for name, files in variants.items():
            for path, data in files.items():
                digest = Digest.of(data)
                urls = (*(blobs[digest].urls if digest in blobs else ()), *(f"{source}/{path}" for source in sources))
                blobs[digest] = LockedBlob(size=len(data), urls=tuple(dict.fromkeys(urls)))
            rows[name] = LockedVariant(files={path: Digest.of(data) for path, data in files.items()})
        locked[key] = LockedModel(variants=rows, default=default or next(iter(variants), None))
    return Lockfile(manifest="sha256:" + "0" * 64, models=locked, blobs=blobs)


def objects_of(files: Mapping[str, bytes], source: str = "mem://origin/m") -> dict[str, bytes]:
    """What a memory source has to serve for ``lock_of`` with this source."""
    return {f"{source}/{path}": data for path, data in files.items()}


def manifest_of(*sources: str, variant: str = "") -> str:
    """A manifest of one model, ``m@1``, with one variant, ``v``; *variant* is the text of that variant's table."""
    listed = ", ".join(f'"{source}"' for source in sources)
    return f'schema = 1\n[models."m"]\nversion = "1"\nsources = [{listed}]\n[models."m".variants.v]\n{variant}\n'


def write_lock(folder: Path, lock: Lockfile, name: str = "models.lock") -> Path:
    """Write a lockfile; its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(lock.format())
    return path


def ensurer_of(folder: Path, lock: Lockfile, source: Source | None = None, **more: Any) -> ModelEnsurer:
    """An ensurer over ``folder/root`` whose ``mem://`` (and with *sources*, other schemes) is what the test made."""
    path = write_lock(folder, lock)
    sources: dict[str, Source] = more.pop("sources", {})
    if source is not None:
        sources = {"mem": source, **sources}
    from modelstow.backends.registry import FACTORIES

    factories = {**FACTORIES, **{scheme: (lambda made=made: made) for scheme, made in sources.items()}}
    more.setdefault("retry", IMPATIENT)
    return ModelEnsurer.open(root=folder / "root", lockfile=path, factories=factories, **more)


def tree_of(path: Path) -> dict[str, bytes]:
    """Every file of a folder with its content."""
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


def blobs_of(root: Path) -> dict[str, Path]:
    """Every committed blob of a store by its hex digest."""
    return {p.name: p for p in (root / "blobs").rglob("*") if p.is_file() and len(p.name) == 64}


def assert_sound(root: Path) -> None:
    """Every visible blob equals its name, and nothing of staging is left in the models folder."""
    for name, path in blobs_of(root).items():
        assert Digest.of_path(path).hex == name, f"{path} is not its name"
    assert not list((root / "models").rglob(".*.modelstow")), "staging was left behind"


def leftovers(root: Path) -> list[str]:
    """What is left of unfinished work: partials, staging folders, temporary names."""
    found = list((root / "partial").iterdir()) if (root / "partial").is_dir() else []
    found += [p for p in root.rglob("*") if p.name.startswith((".tmp-", ".modelstow-")) or p.name.endswith(".modelstow")]
    return sorted(str(p.relative_to(root)) for p in found)


@dataclass(frozen=True)
class Ran:
    """A finished command line."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@dataclass
class Cli:
    """The real command line in a folder of its own. ``root`` is the store."""

    folder: Path

    @property
    def root(self) -> Path:
        return self.folder / "root"

    def environ(self, **more: str) -> dict[str, str]:
        """The environment of every command: nothing of the machine's own settings of modelstow, hubs or proxies."""
        keep = {
            key: value for key, value in os.environ.items() if not key.startswith(("MODELSTOW", "MODELS_", "HF_", "AWS_"))
        }
        for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NETRC", "XDG_DATA_HOME", "XDG_CACHE_HOME"):
            keep.pop(name, None)
        return {**keep, "MODELSTOW_ROOT": str(self.root), "HOME": str(self.folder), "COLUMNS": "120", **more}

    def argv(self, *args: str | Path) -> list[str]:
        return [sys.executable, "-m", "modelstow", *map(str, args)]

    def run(self, *args: str | Path, **environ: str) -> Ran:
        """Run a command to its end."""
        done = subprocess.run(
            self.argv(*args),
            cwd=self.folder,
            env=self.environ(**environ),
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
        )
        return Ran(done.returncode, done.stdout, done.stderr)

    def ok(self, *args: str | Path, **environ: str) -> Ran:
        """Run a command that must succeed."""
        ran = self.run(*args, **environ)
        assert ran.code == 0, f"{args} ended with {ran.code}\n{ran.out}\n{ran.err}"
        return ran

    def start(self, *args: str | Path, endless_reads: bool = False, **environ: str) -> subprocess.Popen[str]:
        """Start a command. With *endless_reads* no read from a socket times out, so that a command which waits for a
        silent server does not end by itself."""
        argv = [sys.executable, "-c", _ENDLESS_READS, *map(str, args)] if endless_reads else self.argv(*args)
        return subprocess.Popen(
            argv,
            cwd=self.folder,
            env=self.environ(**environ),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )


class CalledCli(Cli):
    """The same commands, run by calling ``main``: most tests of what a command does need no process of its own, whose
    start takes longer than all that they prove. ``start`` still starts one."""

    def run(self, *args: str | Path, **environ: str) -> Ran:
        """Run a command to its end, in this process."""
        out, err, variables = io.StringIO(), io.StringIO(), self.environ(**environ)
        with chdir(self.folder), patch.dict(os.environ, variables, clear=True):
            with redirect_stdout(out), redirect_stderr(err):
                code = main([*map(str, args)], variables)
        return Ran(code, out.getvalue(), err.getvalue())

    def in_a_process(self) -> Cli:
        """The same folder and store, for commands that need a process of their own."""
        return Cli(self.folder)


def memory(files: Mapping[str, bytes], source: str = "mem://origin/m") -> MemorySource:
    """A memory source that serves *files*."""
    return MemorySource(objects_of(files, source))
