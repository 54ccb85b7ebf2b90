"""How fast is one store verified at each level, beside reading it, other hash tools and ``hf cache verify``?

Two large blobs (1 GiB each) in the page cache; every row is a whole process. ``quick`` reads no content: it believes the
inode. ``fast`` proves every byte against the piece table (xxh3-128: finds accidents, not people), ``full`` against sha256.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from . import fakehub, peers
from .fixtures import World, large_file, lock_of, write_lock
from .measure import CLI, HASH, CommandFailed, Contender, Options, Row, absent, command, contest, plain, rows, tool
from .servers import started

QUESTION = "verification"


def run(options: Options) -> list[Row]:
    """Ask it; *options.size* is the size of each of the two blobs."""
    world, files = _world(options)
    missing: list[Row] = []
    with ExitStack() as stack:
        contenders = [*_ours(world), *_tools(world, files, missing)]
        try:
            contenders.append(_hf(options, files, stack))
        except (peers.NotAvailable, CommandFailed) as error:
            missing.append(absent(QUESTION, "hf cache verify", str(error)))
        samples = contest(contenders, options.repeats)
    total = 2 * options.size
    found = rows(QUESTION, contenders, samples, ratio_to="cat")
    return [replace(row, note=_rate(row, total)) for row in found] + missing


def _world(options: Options) -> tuple[World, list[Path]]:
    folder = options.folder(QUESTION)
    source = folder / "source"
    source.mkdir()
    names = ("one.safetensors", "two.safetensors")
    files = {name: (large_file(source / name, options.size), options.size) for name in names}
    world = write_lock(folder, lock_of(files, "source"))
    plain([*CLI, "reconcile"], cwd=folder, env=world.env)
    return world, [source / name for name in names]


def _ours(world: World) -> Iterator[Contender]:
    for option, note in (("--quick", "reads no content"), ("", "xxh3-128"), ("--full", "sha256")):
        argv = [*CLI, "verify", "--json", *([option] if option else [])]
        yield command(f"modelstow verify {option}".rstrip(), argv, cwd=world.folder, env=world.env, note=note)


def _tools(world: World, files: list[Path], missing: list[Row]) -> Iterator[Contender]:
    yield command("aligned sha256, a thread a file", [*HASH, *files], cwd=world.folder, env=world.env, note="sha256")
    one, two = (f"'{path}'" for path in files)
    both = f"openssl dgst -sha256 {one} & first=$!; openssl dgst -sha256 {two} && wait $first"
    for name, program, line, note in (
        ("cat", "cat", f"cat {one} {two} >/dev/null", "the limit: reading alone"),
        ("openssl dgst, two processes", "openssl", both, "sha256"),
        ("b3sum", "b3sum", f"b3sum {one} {two}", "blake3"),
        ("sha256sum", "sha256sum", f"sha256sum {one} {two}", "sha256"),
    ):
        if tool(program) is None:
            missing.append(absent(QUESTION, name, f"{program} is not installed"))
        else:
            yield command(name, ["sh", "-c", line], cwd=world.folder, env=world.env, note=note)


def _hf(options: Options, files: list[Path], stack: ExitStack) -> Contender:
    """A cache that ``hf`` itself downloaded from the fake hub. Raises NotAvailable, CommandFailed."""
    program = peers.hf(options)
    folder = options.folder("hf")
    address = stack.enter_context(started("fakehub", files[0].parent))
    env = peers.hub(folder, address)
    plain([program, "download", fakehub.REPOSITORY], cwd=folder, env=env)
    argv = [program, "cache", "verify", fakehub.REPOSITORY, "--revision", fakehub.COMMIT]
    plain(argv, cwd=folder, env=env)
    return command("hf cache verify", argv, cwd=folder, env=env, note="sha256, against a local fake hub")


def _rate(row: Row, total: int) -> str:
    """The note of a row with its throughput, where it reads content."""
    if row.value is None or "no content" in row.note:
        return row.note
    return f"{row.note}; {total / row.value / 1e9:.2f} GB/s"
