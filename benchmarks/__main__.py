"""``python -m benchmarks``: ask every question, print a table, write ``.bench/results.json``."""

from __future__ import annotations

import argparse
import datetime
import importlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from modelstow.reconcile.cli.output import table
from modelstow.reconcile.settings import parse_size

from .measure import GIB, CommandFailed, Options, Row, absent

QUESTIONS = ("verification", "noop", "materialise", "locking", "memory", "download", "capped", "small", "kills")


def main(argv: Sequence[str]) -> int:
    """Run the command line; 1 if a question could not be asked at all."""
    args = _parser().parse_args(argv)
    out = Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix="work-", dir=args.scratch or out.parent)).absolute()
    results: dict[str, list[Row]] = {}
    try:
        for name in args.only or QUESTIONS:
            print(f"asking: {name}", file=sys.stderr, flush=True)
            results[name] = _ask(name, _options(args, scratch))
            print("\n".join(["", *lines(name, results[name])]), flush=True)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    document = {"machine": machine(out.parent), "rows": [asdict(row) for found in results.values() for row in found]}
    out.write_text(json.dumps(document, indent=1) + "\n")
    print(f"\n{json.dumps(document['machine'])}\nwritten to {out}")
    return 1 if any(row.row == name for name, found in results.items() for row in found) else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--only", action="append", choices=QUESTIONS, help="ask this question; may be repeated")
    parser.add_argument("--repeats", type=int, default=5, help="how often each row is measured (5)")
    parser.add_argument("--quick", action="store_true", help="small sizes: shows that it works, says nothing about speed")
    parser.add_argument("--size", type=lambda text: parse_size(text, "--size"), help="bytes of a large file (1GiB)")
    parser.add_argument("--files", type=int, action="append", help="files in a tree; may be repeated (10000, 100000)")
    parser.add_argument("--seed", type=int, metavar="N", help="of the moments of kills (default: another each time)")
    parser.add_argument("--out", default=".bench/results.json", metavar="FILE", help="where the results go")
    parser.add_argument("--scratch", metavar="DIR", help="where worlds are built (default: beside the results)")
    parser.add_argument("--peers", default=".bench/peers", metavar="DIR", help="virtual environment of peers")
    return parser


def _options(args: argparse.Namespace, scratch: Path) -> Options:
    options = Options(
        scratch=scratch,
        peers=Path(args.peers).absolute(),
        repeats=max(1, args.repeats),
        size=args.size or (4 << 20 if args.quick else GIB),
        files=tuple(args.files or ((200, 500) if args.quick else (10_000, 100_000))),
        install_peers=not args.quick,
        seed=args.seed,
    )
    return replace(options, repeats=min(options.repeats, 2)) if args.quick else options


def _ask(name: str, options: Options) -> list[Row]:
    try:
        found: list[Row] = importlib.import_module(f".{name}", __package__).run(options)
    except (CommandFailed, OSError) as error:
        return [absent(name, name, str(error))]
    return found


def lines(name: str, rows: Sequence[Row]) -> list[str]:
    """One question's rows as a table for people."""
    cells = [(name, "", "ratio", "to", "")]
    for row in rows:
        ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
        cells.append((row.row, figure(row), ratio, row.ratio_to if row.ratio is not None else "", row.note))
    return table(cells, right=frozenset({1, 2}))


def figure(row: Row) -> str:
    """A value with its unit."""
    if row.value is None:
        return "-"
    if row.unit == "s":
        return f"{row.value * 1000:.0f} ms" if row.value < 1 else f"{row.value:.2f} s"
    return f"{row.value:,.2f}".rstrip("0").rstrip(".") + f" {row.unit}"


def machine(folder: Path) -> dict[str, str]:
    """What the figures were measured on."""
    return {
        "date": datetime.date.today().isoformat(),
        "cores": str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()),
        "cpu": _cpu(),
        "kernel": f"{platform.system()} {'.'.join(platform.release().split('.')[:2])}",
        "python": platform.python_version(),
        "file_system": _file_system(folder),
    }


def _cpu() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _file_system(folder: Path) -> str:
    done = subprocess.run(["stat", "-f", "-c", "%T", str(folder)], capture_output=True, text=True)
    name = done.stdout.strip() or "unknown"
    return "ext4" if name == "ext2/ext3" else name  # they share a magic number


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
