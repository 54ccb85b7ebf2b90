"""How fast do a thousand small files arrive?

1,000 files of 10 KiB, each of its own content: ``modelstow reconcile`` with its lockfile made before, ``aria2c`` with a
list that has every checksum, ``curl`` without any as the limit, from the same web server; ``hf download`` from a local
fake hub, whose files it lists by itself, and ``modelstow reconcile`` from that hub too, because its server is a slower one.
Every run writes into a new folder, and on the disk nothing is deleted before the end. The rows on tmpfs leave disk and
fsync out.
"""

from __future__ import annotations

import os
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from modelstow.cas import Digest

from . import fakehub, peers
from .fixtures import lock_of, write_lock
from .measure import CLI, Contender, Options, Row, absent, contest, rows, tool
from .output_dirs import Place, places
from .servers import started, web

QUESTION = "small"
_COUNT, _SIZE = 1_000, 10 << 10  # files, bytes in each
_OURS, _ARIA2C, _CURL, _HF = "modelstow reconcile", "aria2c -i LIST -j8 -x1", "curl -Z, 8 at once", "hf download"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Served:
    """The files: where they are served and listed. ``missing``: rows that have no figure here."""

    folder: Path  # with the lockfile for the web server, and the lists
    server: str
    hub_folder: Path  # with the lockfile for the hub
    hub: str
    hf: Path | None
    missing: list[Row] = field(default_factory=list)


def run(options: Options) -> list[Row]:
    """Ask it with 1,000 files, or as many as the smallest tree has."""
    count = min(_COUNT, *options.files)
    with ExitStack() as stack:
        served = _served(options, count, stack)
        where, reason = stack.enter_context(places(served.folder, 64 * count * _SIZE, frees=False))
        if reason:
            served.missing.append(absent(QUESTION, "on tmpfs", reason))
        contenders: list[Contender] = []
        against: dict[str, str] = {}
        for place in where:
            found = _at(place, served)
            contenders += found
            against |= {each.name: found[0].name for each in found}
        samples = contest(contenders, options.repeats, settle=True)
        return rows(QUESTION, contenders, samples, ratio_to=_OURS, against=against) + served.missing


def _served(options: Options, count: int, stack: ExitStack) -> _Served:
    folder, hub_folder = options.folder(QUESTION), options.folder(f"{QUESTION}-hub")
    files_folder = folder / "served"
    files_folder.mkdir()
    files = {}
    for number in range(count):
        data = os.urandom(_SIZE)
        name = f"file{number:04d}.bin"
        (files_folder / name).write_bytes(data)
        files[name] = (Digest.of(data), _SIZE)
    address, server = stack.enter_context(web(files_folder, folder))
    hub = stack.enter_context(started("fakehub", files_folder))
    write_lock(folder, lock_of(files, address))
    write_lock(hub_folder, lock_of(files, f"{hub}/{fakehub.REPOSITORY}/resolve/{fakehub.COMMIT}"))
    rows_ = (f"{address}/{name}\n checksum=sha-256={digest.hex}\n" for name, (digest, _) in files.items())
    (folder / "aria2.txt").write_text("".join(rows_))
    (folder / "curl.txt").write_text("".join(f'url = "{address}/{name}"\nremote-name\n' for name in files))
    missing = [
        absent(QUESTION, name, f"{name.split()[0]} is not installed") for name in (_ARIA2C, _CURL) if not _there(name)
    ]
    hf = None
    try:
        hf = peers.hf(options)
    except peers.NotAvailable as error:
        missing.append(absent(QUESTION, _HF, str(error)))
    return _Served(folder=folder, server=server, hub_folder=hub_folder, hub=hub, hf=hf, missing=missing)


def _there(name: str) -> bool:
    return tool(name.split()[0]) is not None


def _at(place: Place, served: _Served) -> list[Contender]:
    """Who writes into a place; the first is what the others are compared with."""
    ours = [*CLI, "reconcile", "--json"]
    durable, hasty = ("", "") if place.label else (", fsync", ", no fsync")
    argv: list[str | Path]
    found = [
        place.contender(_OURS, ours, cwd=served.folder, note=f"sha256{durable}; lockfile made before; from {served.server}")
    ]
    if _there(_ARIA2C):
        argv = ["aria2c", "-i", served.folder / "aria2.txt", "-j8", "-x1", "-q", "--no-conf"]
        found.append(place.contender(_ARIA2C, argv, note=f"sha256{hasty}; from {served.server}"))
    if _there(_CURL):
        argv = ["curl", "-sSf", "-Z", "--parallel-max", "8", "-K", served.folder / "curl.txt"]
        found.append(place.contender(_CURL, argv, note=f"no hash{hasty}; from {served.server}"))
    if served.hf:
        note, argv = "sizes only; from a local fake hub, which it lists", [served.hf, "download", fakehub.REPOSITORY]
        found.append(place.contender(_HF, argv, note=note, env=lambda new: peers.hub(new, served.hub)))
    name, note = f"{_OURS}, from the fake hub", f"sha256{durable}; from the same hub, a Python server"
    found.append(place.contender(name, ours, cwd=served.hub_folder, note=note))
    return found
