"""Running contenders and comparing them: rows, samples, rotation, paired ratios."""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

GIB = 1 << 30
CLI = (sys.executable, "-m", "modelstow")
HASH = (sys.executable, str(Path(__file__).with_name("hashloop.py")))
"""A command that prints the sha256 of the files after it, read into aligned buffers."""
_WATCH = Path(__file__).with_name("watch.py")


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What is asked for. ``scratch`` is an empty folder for worlds; its owner deletes it."""

    scratch: Path
    peers: Path  # a virtual environment with other projects' tools
    repeats: int = 5
    size: int = GIB  # bytes in a large file
    files: tuple[int, ...] = (10_000, 100_000)  # in a tree
    install_peers: bool = True
    seed: int | None = None  # of what is random; None: another each time

    def folder(self, name: str) -> Path:
        """A new folder below the scratch folder."""
        path = self.scratch / name
        path.mkdir(parents=True)
        return path


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of a result. ``value`` is None where there is no figure; ``note`` then says why."""

    question: str
    row: str
    value: float | None
    unit: str = "s"
    ratio_to: str = ""
    ratio: float | None = None  # this row's value by that of ``ratio_to``: the median over repeats
    note: str = ""


@dataclass(frozen=True, slots=True)
class Sample:
    """One process, run to its end."""

    seconds: float
    peak_rss: int  # bytes


@dataclass(frozen=True, slots=True)
class Contender:
    """Something to measure. ``run`` gets the number of the repeat and makes its own fresh folders."""

    name: str
    run: Callable[[int], Sample]
    note: str = ""


class CommandFailed(Exception):
    """A measured command ended with another exit code than 0."""


def environment(root: Path, **more: str) -> dict[str, str]:
    """The environment of measured commands: nothing of this user's settings of modelstow, hubs, proxies or Python.

    PYTHONPATH stays, so that another checkout can be measured; without compiled modules every start would compile again.
    """
    drop = ("MODELSTOW", "MODELS_", "HF_", "AWS_", "PYTHONDONTWRITEBYTECODE", "PYTHONUNBUFFERED", "PYTHONPYCACHEPREFIX")
    keep = {k: v for k, v in os.environ.items() if not k.startswith(drop) and not k.lower().endswith("_proxy")}
    return {**keep, "MODELSTOW_ROOT": str(root), "HOME": str(root.parent), **more}


def timed(argv: Sequence[str | Path], *, cwd: Path, env: Mapping[str, str]) -> Sample:
    """Run a command to its end through a small launcher. Raises CommandFailed.

    The launcher is a process of its own because Linux counts the memory of the process that forks in the peak of the
    one that is executed: a large benchmark would lend its size to everything it measures.
    """
    done = subprocess.run(
        [sys.executable, "-I", "-S", _WATCH, *map(str, argv)], cwd=cwd, env=env, capture_output=True, text=True
    )
    report = json.loads(done.stdout.rstrip().rpartition("\n")[2]) if done.stdout else {"code": done.returncode}
    if report["code"] != 0:
        output = (done.stderr or done.stdout)[-600:]
        raise CommandFailed(f"{' '.join(map(str, argv))[:200]} ended with {report['code']}: {output}")
    return Sample(report["seconds"], report["peak_rss"])


def command(name: str, argv: Sequence[str | Path], *, cwd: Path, env: Mapping[str, str], note: str = "") -> Contender:
    """A contender that runs the same command in every repeat."""
    return Contender(name, lambda repeat: timed(argv, cwd=cwd, env=env), note)


def plain(argv: Sequence[str | Path], *, cwd: Path, env: Mapping[str, str]) -> str:
    """Run a command that is part of the preparation; its output. Raises CommandFailed."""
    done = subprocess.run([*map(str, argv)], cwd=cwd, env=env, capture_output=True, text=True)
    if done.returncode != 0:
        raise CommandFailed(f"{' '.join(map(str, argv))[:200]} ended with {done.returncode}: {done.stderr[-600:]}")
    return done.stdout


def contest(
    contenders: Sequence[Contender], repeats: int, *, warm: bool = True, settle: bool = False
) -> dict[str, list[Sample]]:
    """Measure every contender *repeats* times, in an order that rotates; *warm*: after one round that does not count.

    *settle*: what the row before left to be written back is on the disk before the next one begins.
    """
    samples: dict[str, list[Sample]] = {each.name: [] for each in contenders}
    for repeat in range(-1 if warm else 0, repeats):
        shift = repeat % len(contenders)
        for each in (*contenders[shift:], *contenders[:shift]):
            if settle:
                os.sync()
            sample = each.run(repeat)
            if repeat >= 0:
                samples[each.name].append(sample)
    return samples


def rows(
    question: str,
    contenders: Sequence[Contender],
    samples: Mapping[str, Sequence[Sample]],
    *,
    ratio_to: str,
    label: str = "",
    against: Mapping[str, str] | None = None,
) -> list[Row]:
    """Median seconds of each contender and the median of its paired ratios to *ratio_to*, or to what *against* names."""
    found = []
    for each in contenders:
        other = (against or {}).get(each.name, ratio_to)
        base = [s.seconds for s in samples[other]]
        seconds = [s.seconds for s in samples[each.name]]
        ratio = statistics.median(mine / theirs for mine, theirs in zip(seconds, base, strict=True))
        row = Row(
            question=question,
            row=label + each.name,
            value=statistics.median(seconds),
            ratio_to=label + other,
            ratio=ratio,
            note=each.note,
        )
        found.append(row)
    return found


def peak(samples: Sequence[Sample]) -> int:
    """The highest memory of any of them, in bytes."""
    return max(sample.peak_rss for sample in samples)


def absent(question: str, row: str, reason: str) -> Row:
    """A peer that could not be measured."""
    return Row(question=question, row=row, value=None, note=f"not available: {reason}")


def tool(name: str) -> str | None:
    """Where a program is, if it is installed."""
    return shutil.which(name) or shutil.which(name, path="/usr/sbin:/usr/local/sbin:/sbin")
