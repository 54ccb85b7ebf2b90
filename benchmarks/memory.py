"""How much memory do large files take? Peak resident memory above that of an idle ``modelstow --version``.

One file of 4 GiB from a local HTTP server: ``lock`` of a listing that names no digest (every byte is fetched and proven),
``reconcile`` into an empty store, ``verify`` and ``verify --full``. The file is mostly holes, but no two pieces are alike.
"""

from __future__ import annotations

from pathlib import Path

from .fixtures import large_file
from .measure import CLI, Options, Row, Sample, environment, timed
from .servers import started

QUESTION = "memory"
TIMES = 4  # the file is so many times options.size

_MANIFEST = """\
schema = 1

[models."big"]
version = "1.0.0"
sources = ["{address}/"]
default = "all"

[models."big".variants.all]
"""


def run(options: Options) -> list[Row]:
    """Ask it once: memory does not vary from repeat to repeat."""
    folder = options.folder(QUESTION)
    served = folder / "served"
    served.mkdir()
    large_file(served / "model.safetensors", TIMES * options.size, sparse=True)
    with started("servers", served) as address:
        (folder / "models.toml").write_text(_MANIFEST.format(address=address))
        return _rows(folder)


def _rows(folder: Path) -> list[Row]:
    idle = _measured(folder, "idle", "--version")
    found = [Row(question=QUESTION, row="modelstow --version, in all", value=idle.peak_rss / 1e6, unit="MB")]
    for name, root, argv in (
        ("lock, fetching", "lock", ["lock"]),
        ("reconcile over HTTP", "store", ["reconcile"]),
        ("verify", "store", ["verify"]),
        ("verify --full", "store", ["verify", "--full"]),
    ):
        sample = _measured(folder, root, *argv)
        above = (sample.peak_rss - idle.peak_rss) / 1e6
        note = f"in {sample.seconds:.1f} s"
        found.append(Row(question=QUESTION, row=f"{name}, above that", value=above, unit="MB", note=note))
    return found


def _measured(folder: Path, root: str, *argv: str) -> Sample:
    return timed([*CLI, *argv], cwd=folder, env=environment(folder / root))
