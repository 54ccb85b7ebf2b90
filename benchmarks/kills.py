"""What does a download cost that is killed again and again?

One file of 160 MB from a server that sends 14 MB/s in all and counts what it sends. The client is killed (SIGKILL) ten
times at random moments, started again each time, and then left alone. With two connections, a kill may cost two pieces of
8 MiB that were not whole yet, a tenth of the file: so the server should send at most 1.05 + 0.12 × kills times the file.
"""

from __future__ import annotations

import random
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from .fixtures import large_file, lock_of, write_lock
from .measure import CLI, CommandFailed, Options, Row, environment
from .rate_capped_server import bytes_sent
from .servers import started

QUESTION = "kills"
_SIZE, _RATE = 160_000_000, 14_000_000  # bytes; bytes a second
_KILLS, _FEW = 10, 2  # for an answer, and where it is only to be shown that it works
_LATEST_S = 3.0  # a kill comes at most so many seconds after its process began
_PATIENCE_S = 600.0
_NAME = "model.safetensors"
_LOST = 0.12 * _SIZE  # bytes that a kill may cost: two pieces and what was on its way
_OURS, _BOUND = "modelstow reconcile --connections 2", "the bound"
_UNIT = "× the file sent"


def run(options: Options) -> list[Row]:
    """Ask it once, whatever the repeats."""
    folder = options.folder(QUESTION)
    served = folder / "served"
    served.mkdir()
    size = min(_SIZE, 8 * options.size)
    digest = large_file(served / _NAME, size)
    seed = random.SystemRandom().randrange(1 << 32) if options.seed is None else options.seed
    chance = random.Random(seed)
    moments = [chance.uniform(0, _LATEST_S) for _ in range(_KILLS if size == _SIZE else _FEW)]
    with started("rate_capped_server", served, "server", str(_RATE)) as address:
        write_lock(folder, lock_of({_NAME: (digest, size)}, address))
        argv = [*CLI, *_OURS.split()[1:], "--json"]
        sent, kills, note = _killed(argv, folder, environment(folder / "root"), address, moments)
    lost = _LOST / size
    bound, ours = 1.05 + lost * kills, sent / size
    terms = f"1.05 + {lost:.2f} × kills; seed {seed}"
    return [
        Row(question=QUESTION, row=_OURS, value=ours, unit=_UNIT, ratio_to=_BOUND, ratio=ours / bound, note=note),
        Row(question=QUESTION, row=_BOUND, value=bound, unit=_UNIT, ratio_to=_BOUND, ratio=1.0, note=terms),
    ]


def _killed(
    argv: Sequence[str | Path], cwd: Path, env: Mapping[str, str], address: str, moments: Sequence[float]
) -> tuple[int, int, str]:
    """Bytes that the server sent until a run came to its end, kills until then, and words. Raises CommandFailed."""
    kills, output, began = 0, b"", time.monotonic()
    for moment in (*moments, _PATIENCE_S):
        with subprocess.Popen(
            [*map(str, argv)], cwd=cwd, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        ) as run:
            try:
                _, output = run.communicate(timeout=moment)
                break
            except subprocess.TimeoutExpired:
                run.kill()
                kills += 1
    if run.returncode != 0:
        raise CommandFailed(
            f"{argv[-2]} {argv[-1]} ended with {run.returncode} after {kills} kills: {output.decode()[-300:]}"
        )
    return bytes_sent(address), kills, f"{kills} kills, complete after {time.monotonic() - began:.0f} s"
