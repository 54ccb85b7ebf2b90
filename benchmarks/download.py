"""How fast does 1 GiB arrive, proven by sha256, from a local web server?

``modelstow reconcile`` into a new store, beside ``curl`` and then ``openssl dgst``, ``hf download`` and then ``hf cache
verify``, and the sha256 of the cached file as the limit. Ours ends with an fsync of the blob and its folder; "curl, sync,
then openssl" does as much, the others do not. The rows on tmpfs leave the disk and fsync out for everybody.

Each run writes into a new folder; what it wrote is removed and the disk synced before the next one begins.
"""

from __future__ import annotations

import shlex
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from . import fakehub, peers
from .fixtures import large_file, lock_of, write_lock
from .measure import CLI, HASH, Contender, Options, Row, absent, command, contest, environment, rows, tool
from .output_dirs import Place, places
from .servers import started, web

QUESTION = "download"
_NAME = "model.safetensors"
_LIMIT = "sha256 of the cached file"
_OURS, _CURL, _HF = "modelstow reconcile", "curl, then openssl dgst", "hf download, then hf cache verify"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Served:
    """The file's lockfile and who serves it. ``hf`` and ``hub``: the program and its address, where they are there."""

    folder: Path
    address: str
    server: str
    hf: Path | None = None
    hub: str = ""


def run(options: Options) -> list[Row]:
    """Ask it with one file of *options.size*."""
    if tool("openssl") is None:
        return [absent(QUESTION, _LIMIT, "openssl is not installed")]
    folder = options.folder(QUESTION)
    (folder / "served").mkdir()
    file = folder / "served" / _NAME
    digest = large_file(file, options.size)
    missing = [] if tool("curl") else [absent(QUESTION, _CURL, "curl is not installed")]
    with ExitStack() as stack:
        address, server = stack.enter_context(web(file.parent, folder))
        write_lock(folder, lock_of({_NAME: (digest, options.size)}, address))
        served = _Served(folder=folder, address=address, server=server)
        try:
            program, hub = peers.hf(options), stack.enter_context(started("fakehub", file.parent))
            served = _Served(folder=folder, address=address, server=server, hf=program, hub=hub)
        except peers.NotAvailable as error:
            missing.append(absent(QUESTION, _HF, str(error)))
        where, reason = stack.enter_context(places(folder, 2 * options.size, frees=True))
        if reason:
            missing.append(absent(QUESTION, "on tmpfs", reason))
        return _asked(where, served, file, options.repeats) + missing


def _asked(where: list[Place], served: _Served, file: Path, repeats: int) -> list[Row]:
    """All in one contest: ours beside the limit, the others beside ours in the same place."""
    contenders, against = [], {_LIMIT: _LIMIT}
    for place in where:
        ours, *others = _at(place, served)
        contenders += [ours, *others]
        against |= {ours.name: _LIMIT, **{each.name: ours.name for each in others}}
    env = environment(served.folder / "root")
    contenders.append(
        command(_LIMIT, ["openssl", "dgst", "-sha256", file], cwd=served.folder, env=env, note="openssl dgst")
    )
    samples = contest(contenders, repeats, settle=True)
    return rows(QUESTION, contenders, samples, ratio_to=_LIMIT, against=against)


def _at(place: Place, served: _Served) -> list[Contender]:
    """Who writes into a place, ours first."""
    on_disk = not place.label
    note = f"sha256, piece table{', fsync' if on_disk else ''}; from {served.server}"
    found = [place.contender(_OURS, [*CLI, "reconcile", "--json"], cwd=served.folder, note=note)]
    fetch, hash_ = f"curl -sSfO {served.address}/{_NAME}", f"openssl dgst -sha256 {_NAME}"
    if tool("curl"):
        found.append(
            place.contender(_CURL, ["sh", "-c", f"{fetch} && {hash_}"], note=f"sha256{', no fsync' if on_disk else ''}")
        )
    if tool("curl") and on_disk:
        line = f"{fetch} && sync {_NAME} && {hash_}"
        found.append(place.contender("curl, sync, then openssl dgst", ["sh", "-c", line], note="sha256, fsync"))
    if tool("curl"):
        synced = f" && sync {_NAME}" if on_disk else ""
        line = f"{fetch}{synced} && {shlex.join(HASH)} {_NAME}"
        name = f"curl{', sync' if on_disk else ''}, then aligned sha256"
        found.append(place.contender(name, ["sh", "-c", line], note=f"sha256{', fsync' if on_disk else ''}"))
    if served.hf:
        hf, verify = shlex.quote(str(served.hf)), f"cache verify {fakehub.REPOSITORY} --revision {fakehub.COMMIT}"
        argv = ["sh", "-c", f"{hf} download {fakehub.REPOSITORY} && {hf} {verify}"]
        note = "sha256, from a local fake hub, without xet"
        found.append(place.contender(_HF, argv, note=note, env=lambda new: peers.hub(new, served.hub)))
    return found
