"""How fast does 1 GiB arrive, proven by sha256, from a local web server?

``modelstow reconcile`` into a new store, beside ``curl`` and then ``openssl dgst``, and the sha256 of the cached file as
the limit. Ours ends with an fsync of the blob and its folder; "curl, sync, then openssl" does as much, plain curl does not.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path

from .measure import CLI, Contender, Options, Row, Sample, absent, command, contest, environment, plain, rows, timed, tool
from .servers import web
from .worlds import large_file

QUESTION = "download"
_NAME = "model.safetensors"
_LIMIT = "sha256 of the cached file"

_MANIFEST = """\
schema = 1

[models."big"]
version = "1.0.0"
sources = ["{address}/"]
default = "all"

[models."big".variants.all]
"""


def run(options: Options) -> list[Row]:
    """Ask it with one file of *options.size*."""
    if tool("openssl") is None:
        return [absent(QUESTION, _LIMIT, "openssl is not installed")]
    folder = options.folder(QUESTION)
    served = folder / "served"
    served.mkdir()
    digest = large_file(served / _NAME, options.size)
    (served / "SHA256SUMS").write_text(f"{digest.hex}  {_NAME}\n")
    with web(served, folder) as (address, server):
        (folder / "models.toml").write_text(_MANIFEST.format(address=address))
        plain([*CLI, "lock"], cwd=folder, env=environment(folder / "lock"))
        contenders = [_ours(folder, server), *_curl(folder, address), _limit(folder, served)]
        found = rows(QUESTION, contenders, contest(contenders, options.repeats), ratio_to=_LIMIT)
    missing = [] if tool("curl") else [absent(QUESTION, "curl, then openssl dgst", "curl is not installed")]
    return found + missing


def _ours(folder: Path, server: str) -> Contender:
    def once(repeat: int) -> Sample:
        return timed([*CLI, "reconcile", "--json"], cwd=folder, env=environment(folder / f"root{repeat}"))

    return Contender("modelstow reconcile", once, f"sha256, piece table, fsync; from {server}")


def _curl(folder: Path, address: str) -> list[Contender]:
    if tool("curl") is None:
        return []

    def fetching(prefix: str, last: str) -> Callable[[int], Sample]:
        def once(repeat: int) -> Sample:
            new = shlex.quote(str(folder / f"{prefix}{repeat}"))
            line = f"curl -sSfo {new} {address}/{_NAME} && {last.format(new=new)}"
            return timed(["sh", "-c", line], cwd=folder, env=environment(folder / "root"))

        return once

    hashing = "openssl dgst -sha256 {new}"
    return [
        Contender("curl, then openssl dgst", fetching("plain", hashing), "sha256, no fsync"),
        Contender("curl, sync, then openssl dgst", fetching("synced", "sync {new} && " + hashing), "sha256, fsync"),
    ]


def _limit(folder: Path, served: Path) -> Contender:
    argv = ["openssl", "dgst", "-sha256", served / _NAME]
    return command(_LIMIT, argv, cwd=folder, env=environment(folder / "root"), note="openssl dgst")
