"""Where contenders write: beside the world on its disk, and in memory, where neither the disk nor fsync costs anything."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from .measure import Contender, Sample, environment, timed

_MEMORY = Path("/dev/shm")


def _own(new: Path) -> dict[str, str]:
    return environment(new / "root")


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A folder for results. *frees*: each is removed after its run, outside the time that is measured."""

    folder: Path
    label: str = ""  # before the name of a row
    frees: bool = False

    def contender(
        self,
        name: str,
        argv: Sequence[str | Path],
        *,
        note: str,
        cwd: Path | None = None,
        env: Callable[[Path], dict[str, str]] = _own,
    ) -> Contender:
        """Who runs a command in a new folder, or in *cwd* with a new folder in its environment."""

        def once(repeat: int) -> Sample:
            new = self.folder / f"{re.sub('[^a-z0-9]+', '-', name)}{repeat}"
            new.mkdir()
            try:
                return timed(argv, cwd=cwd or new, env=env(new))
            finally:
                if self.frees:
                    shutil.rmtree(new)

        return Contender(self.label + name, once, note)


@contextmanager
def places(folder: Path, needed: int, *, frees: bool) -> Iterator[tuple[list[Place], str]]:
    """The disk below *folder*, and a tmpfs with room for *needed* bytes; else why there is none.

    Making many files soon after deleting many is slow on ext4 and is not on tmpfs, so *frees* is about the disk only.
    """
    disk = Place(folder=folder, frees=frees)
    if not _MEMORY.is_dir():
        yield [disk], f"there is no {_MEMORY}"
    elif shutil.disk_usage(_MEMORY).free < needed:
        yield [disk], f"{_MEMORY} has no room for {needed:,} bytes"
    else:
        with ExitStack() as stack:
            memory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="benchmarks-", dir=_MEMORY)))
            yield [disk, Place(folder=memory, label="on tmpfs: ", frees=True)], ""
