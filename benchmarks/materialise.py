"""How long does it take to link a tree of 10,000 and of 100,000 files out of a full store?

``modelstow ensure --into NEW`` as a whole process, beside ``cp -al`` of an identical tree and a bare loop of link(2). Ours
also reads and checks the lockfile, looks at every blob, records what it placed, and syncs the folders; the others do not.
Every repeat links into a new folder, and nothing is deleted before the end.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from .fixtures import World, small_files
from .measure import CLI, Contender, Options, Row, Sample, contest, peak, plain, rows, timed

QUESTION = "materialise"
_LOOP = Path(__file__).with_name("linkloop.py")


def run(options: Options) -> list[Row]:
    """Ask it at each of *options.files*."""
    found: list[Row] = []
    for count in options.files:
        found += _at(count, options)
    return found


def _at(count: int, options: Options) -> list[Row]:
    folder = options.folder(f"{QUESTION}-{count}")
    world = small_files(folder, count)
    plain([*CLI, "reconcile"], cwd=folder, env=world.env)
    label = f"{count:,} files: "
    contenders = [
        _linking("modelstow ensure --into", world, lambda new: [*CLI, "ensure", "bench", "--into", new, "--json"]),
        _linking("cp -al", world, lambda new: ["cp", "-al", str(world.tree), new]),
        _linking("a loop of link(2)", world, lambda new: [sys.executable, "-I", "-S", str(_LOOP), str(world.tree), new]),
    ]
    samples = contest(contenders, options.repeats, warm=False)
    highest = peak(samples["modelstow ensure --into"]) / 1e6
    memory = Row(question=QUESTION, row=f"{label}peak memory of ensure", value=highest, unit="MB")
    return [*rows(QUESTION, contenders, samples, ratio_to="cp -al", label=label), memory]


def _linking(name: str, world: World, argv: Callable[[str], list[str]]) -> Contender:
    def once(repeat: int) -> Sample:
        new = world.folder / f"new-{name.replace(' ', '-').replace('/', '')}-{repeat}"
        return timed(argv(str(new)), cwd=world.folder, env=world.env)

    return Contender(name, once)
