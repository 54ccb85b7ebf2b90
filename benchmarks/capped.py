"""What do several connections bring where each is capped?

One file of 256 MiB from a server that sends 20 MB/s on each connection, with no burst for a new request: ``modelstow
reconcile`` with one connection and with eight, ``aria2c`` with eight, ``curl`` with one.
"""

from __future__ import annotations

from pathlib import Path

from .fixtures import large_file, lock_of, write_lock
from .measure import CLI, Contender, Options, Row, absent, contest, rows, tool
from .output_dirs import Place
from .servers import started

QUESTION = "capped"
_SHARE = 4  # the file is options.size by so many
_RATE = 20_000_000  # bytes a second on each connection
_MOST = 8  # connections
_MOST_REPEATS = 3  # the server's clock decides, not the machine
_NAME = "model.safetensors"
_EIGHT, _ONE = f"modelstow reconcile --connections {_MOST}", "modelstow reconcile --connections 1"


def run(options: Options) -> list[Row]:
    """Ask it with one file of a quarter of *options.size*."""
    folder = options.folder(QUESTION)
    served = folder / "served"
    served.mkdir()
    size = options.size // _SHARE
    digest = large_file(served / _NAME, size)
    with started("rate_capped_server", served, "connection", str(_RATE)) as address:
        write_lock(folder, lock_of({_NAME: (digest, size)}, address))
        contenders, missing = _contenders(folder, f"{address}/{_NAME}", digest.hex, size)
        samples = contest(contenders, min(options.repeats, _MOST_REPEATS))
        return rows(QUESTION, contenders, samples, ratio_to=_EIGHT) + missing


def _contenders(folder: Path, url: str, sha256: str, size: int) -> tuple[list[Contender], list[Row]]:
    place = Place(folder=folder)
    least = f"the cap alone takes {size / _RATE / _MOST:.2f} s"
    found, missing = [], []
    for name, note in ((_EIGHT, f"sha256, fsync; {least}"), (_ONE, "sha256, fsync")):
        argv = [*CLI, *name.split()[1:], "--json"]
        found.append(place.contender(name, argv, cwd=folder, note=note))
    checked = f"--checksum=sha-256={sha256}"
    for argv, note in (
        (["aria2c", f"-x{_MOST}", f"-s{_MOST}", "-k1M", "-q", "--no-conf", checked, url], "sha256, no fsync"),
        (["curl", "-sSfO", url], f"no hash; the cap alone takes {size / _RATE:.2f} s"),
    ):
        name = " ".join(argv[:3]) if argv[0] == "aria2c" else argv[0]
        if tool(argv[0]) is None:
            missing.append(absent(QUESTION, name, f"{argv[0]} is not installed"))
        else:
            found.append(place.contender(name, argv, note=note))
    return found, missing
