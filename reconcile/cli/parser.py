"""The command line parser. Options are accepted after the command."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable
from contextlib import suppress

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, NoReturn

VARIANT = "default"
"""The variant that `add` makes by default."""


class _Formatter(argparse.HelpFormatter):
    """Help as wide as the terminal, found without ``shutil``, which loads every compression module."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, width=_columns() - 2)


def _columns() -> int:
    with suppress(ValueError):
        if (columns := int(os.environ.get("COLUMNS", ""))) > 0:
            return columns
    with suppress(AttributeError, ValueError, OSError):
        return os.get_terminal_size(sys.__stdout__.fileno()).columns or 80  # type: ignore[union-attr]
    return 80


class _Parser(argparse.ArgumentParser):
    """A parser that raises instead of exiting, so that errors can be JSON, and takes no abbreviated options."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, allow_abbrev=False, formatter_class=_Formatter)

    def error(self, message: str) -> NoReturn:
        from ..errors import InvalidConfigError

        raise InvalidConfigError(message, hint=_hint(message) or f"see `{self.prog} --help`")


def _hint(message: str) -> str:
    """The hint for a message of argparse; empty where there is none."""
    if match := re.search(r"argument COMMAND: invalid choice: '([^']*)' \(choose from (.*)\)", message, re.DOTALL):
        import difflib

        matches = difflib.get_close_matches(match[1], re.findall(r"'?([\w-]+)'?", match[2]), n=1)
        return f"did you mean `{matches[0]}`?" if matches else "a command comes first, and its options after it"
    if message.startswith("the following arguments are required: COMMAND"):
        return "a command comes first, e.g. `modelstow status`; see `modelstow --help`"
    if message.startswith("unrecognized arguments: -"):
        return "a command comes first, and its options after it; see `modelstow COMMAND --help`"
    if message.startswith("unrecognized arguments: "):
        return "see `modelstow COMMAND --help`; `modelstow ensure SEL` is for single models"
    return ""


def _common() -> _Parser:
    common = _Parser(add_help=False)
    where = common.add_argument_group("where")
    where.add_argument("--root", metavar="DIR", help="the store (MODELSTOW_ROOT, MODELS_ROOT, or the user's data folder)")
    where.add_argument("--lock", metavar="FILE", help="models.lock (default: here or in a folder above)")
    where.add_argument("--manifest", metavar="FILE", help="models.toml (default: here or in a folder above)")
    how = common.add_argument_group("how")
    how.add_argument("--locked", action="store_true", help="exit 7 if the lockfile was not made from this manifest")
    how.add_argument("--offline", action="store_true", help="use no network source; folders are allowed")
    how.add_argument("--connections", metavar="N", help="maximum number of transfers at once (MODELSTOW_CONCURRENCY)")
    how.add_argument("--limit-rate", metavar="RATE", help="limit of bytes per second from sources, e.g. 50MB")
    how.add_argument(
        "--lock-timeout", metavar="SECONDS", help="how long to wait for another process after its last progress (300)"
    )
    output = common.add_argument_group("output")
    output.add_argument("--json", action="store_true", help="one JSON document on stdout")
    output.add_argument("--quiet", "-q", action="store_true", help="no messages on stderr")
    output.add_argument("--verbose", "-v", action="store_true", help="more messages; tracebacks")
    output.add_argument("--no-progress", action="store_true", help="no progress bars (MODELSTOW_NO_PROGRESS)")
    output.add_argument("--progress", choices=["auto", "json"], default="auto", help="json: one event per line on stderr")
    return common


def _link_options(command: argparse.ArgumentParser) -> None:
    modes = "hardlink, reflink, symlink, copy, auto"
    command.add_argument("--link-mode", metavar="MODE", help=f"{modes} (MODELSTOW_LINK_MODE)")
    command.add_argument("--strict-links", action="store_true", help="fail where the link mode does not work")


def _init(command: argparse.ArgumentParser) -> None:
    command.add_argument("--shared", action="store_true", help="also make the store at --root, writable for its group")


def _add(command: argparse.ArgumentParser) -> None:
    command.add_argument("locator", metavar="LOCATOR", help="a folder, http(s)://, hf:// or s3://")
    command.add_argument("--name", help="the model's name (default: from the locator)")
    command.add_argument("--model-version", metavar="VERSION", help="its version (as the locator ends, or 1.0.0)")
    command.add_argument("--variant", default=VARIANT, help=f"the variant's name ({VARIANT})")
    command.add_argument("--include", action="append", default=[], metavar="GLOB", help="files to take; may be repeated")
    command.add_argument(
        "--exclude", action="append", default=[], metavar="GLOB", help="files to leave out; may be repeated"
    )


def _remove(command: argparse.ArgumentParser) -> None:
    command.add_argument("name", metavar="NAME", help="name or name@version")


def _lock(command: argparse.ArgumentParser) -> None:
    command.add_argument("--check", action="store_true", help="write nothing; exit 7 if the lockfile is stale")
    command.add_argument(
        "--upgrade", nargs="?", const="", metavar="NAME", help="list the sources again, of all models or one"
    )


def _plan(command: argparse.ArgumentParser) -> None:
    command.add_argument("selectors", nargs="*", metavar="SEL", help="name[@version][#variant]; default: all")
    command.add_argument("--check", action="store_true", help="exit 3 if there is work")
    _link_options(command)


def _reconcile(command: argparse.ArgumentParser) -> None:
    command.add_argument("--watch", metavar="SECONDS", help="repeat after a pause of so many seconds, until stopped")
    command.add_argument(
        "--prune", action="store_true", help="also remove files in trees that the lockfile does not name: your own"
    )
    command.add_argument("--dry-run", action="store_true", help="print the plan instead")
    _link_options(command)


def _ensure(command: argparse.ArgumentParser) -> None:
    command.add_argument("selectors", nargs="*", metavar="SEL", help="name[@version][#variant]")
    command.add_argument("--all", action="store_true", help="every variant of the lockfile")
    command.add_argument("--force", action="store_true", help="fetch every blob again")
    command.add_argument("--into", metavar="DIR", help="put the files into DIR, next to what others have there")
    command.add_argument(
        "--with", dest="with_", action="append", default=[], metavar="COMPONENT", help="add an optional part"
    )
    command.add_argument("--without", action="append", default=[], metavar="COMPONENT", help="leave a part out")
    command.add_argument(
        "--prune", action="store_true", help="also remove files in trees that the lockfile does not name: your own"
    )
    command.add_argument("--dry-run", action="store_true", help="print the plan instead")
    _link_options(command)


def _status(command: argparse.ArgumentParser) -> None:
    command.add_argument("selectors", nargs="*", metavar="SEL", help="default: all")
    command.add_argument("--check", action="store_true", help="exit 3 unless all are COMPLETE")


def _verify(command: argparse.ArgumentParser) -> None:
    command.add_argument("selectors", nargs="*", metavar="SEL", help="default: every blob and registered tree")
    level = command.add_mutually_exclusive_group()
    level.add_argument("--full", action="store_true", help="against sha256")
    level.add_argument("--quick", action="store_true", help="by stat only")
    command.add_argument("--repair", action="store_true", help="fetch the damaged pieces again")


def _gc(command: argparse.ArgumentParser) -> None:
    command.add_argument("--max-size", metavar="SIZE", help="evict least recently used trees until blobs fit, e.g. 500GB")
    command.add_argument("--free", metavar="SIZE", help="evict until SIZE is free on the disk, e.g. 50GB")
    command.add_argument("--max-age", metavar="AGE", help="evict trees that were last used longer ago, e.g. 30d")
    command.add_argument("--dry-run", action="store_true", help="remove nothing, print what would be removed")
    command.add_argument("--quarantine", action="store_true", help="empty quarantine/ too")
    command.add_argument("--state-lost", action="store_true", help="continue although state/ was lost")
    command.add_argument(
        "--exclusive", action="store_true", help="no other process uses this store (where file locks are unreliable)"
    )
    command.add_argument("--roots", action="store_true", help="list what keeps blobs")
    command.add_argument("--forget", metavar="ROOT", help="drop one root, by its id or path")
    command.add_argument("--explain", metavar="DIGEST|SEL", help="print what keeps a blob or variant")


def _release(command: argparse.ArgumentParser) -> None:
    command.add_argument("folders", metavar="DIR", nargs="+", help="a folder outside the store")


def _evict(command: argparse.ArgumentParser) -> None:
    command.add_argument("selectors", nargs="+", metavar="SEL")
    command.add_argument("--dry-run", action="store_true", help="remove nothing, print what would be removed")


def _push(command: argparse.ArgumentParser) -> None:
    command.add_argument("selectors", nargs="*", metavar="SEL", help="name[@version][#variant]")
    command.add_argument("--all", action="store_true", help="every variant of the lockfile")
    command.add_argument("url", metavar="URL", help="a folder, file:// or s3://bucket/prefix")
    command.add_argument("--compress", action="store_true", help="zstd-compressed pieces, where that saves a tenth")
    command.add_argument("--dry-run", action="store_true", help="send nothing, print what would be sent")


def _which(command: argparse.ArgumentParser) -> None:
    command.add_argument("path", metavar="PATH")


def _diff(command: argparse.ArgumentParser) -> None:
    command.add_argument("old", metavar="OLD.lock")
    command.add_argument("new", metavar="NEW.lock")


def _bench(command: argparse.ArgumentParser) -> None:
    command.add_argument("--size", default="1GiB", metavar="SIZE", help="bytes of the file to measure with (1GiB)")
    command.add_argument("--repeats", default="3", metavar="N", help="how often each row is measured (3)")


def _selectors(command: argparse.ArgumentParser) -> None:
    command.add_argument("selectors", nargs="*", metavar="SEL")


def _some_selectors(command: argparse.ArgumentParser) -> None:
    command.add_argument("selectors", nargs="+", metavar="SEL")


def _no_arguments(command: argparse.ArgumentParser) -> None:
    """A command with the common options alone."""


_COMMANDS: dict[str, tuple[str, Callable[[argparse.ArgumentParser], None]]] = {
    "init": ("write a commented models.toml", _init),
    "add": ("add a model from a locator to models.toml", _add),
    "remove": ("remove a model from models.toml", _remove),
    "lock": ("resolve models.toml into models.lock", _lock),
    "plan": ("print what reconcile would do; changes nothing", _plan),
    "reconcile": ("make the disk equal the lockfile", _reconcile),
    "ensure": ("make some variants ready; prints their paths", _ensure),
    "status": ("the state of each variant, by stat", _status),
    "verify": ("re-read content against the piece tables", _verify),
    "gc": ("remove blobs that nothing keeps; evict on request", _gc),
    "evict": ("remove a tree; gc removes its blobs once no lockfile names them", _evict),
    "release": ("leave a folder that `ensure --into` filled as plain files", _release),
    "pin": ("keep a variant from eviction", _some_selectors),
    "unpin": ("let a variant be evicted again", _some_selectors),
    "push": ("publish blobs to a mirror", _push),
    "ls": ("what is locked and present", _selectors),
    "du": ("logical, physical and shared bytes", _selectors),
    "which": ("which blob, models and trees own a file", _which),
    "diff": ("what an upgrade would fetch, keep and drop", _diff),
    "doctor": ("check this machine and installation", _no_arguments),
    "bench": ("measure verification throughput here", _bench),
}
"""Each command's help and what adds its arguments, in the order of `--help`."""


def build_parser(version: str, only: str | None = None) -> argparse.ArgumentParser:
    """The parser of all commands; with *only* the arguments of that command alone are known, the others by name."""
    top = _Parser(prog="modelstow", description="Model files kept the way a package manager keeps packages.")
    top.add_argument("--version", action="version", version=f"modelstow {version}")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=_Parser)
    common = _common()
    for name, (help_, add_arguments) in _COMMANDS.items():
        if only in (None, name):
            add_arguments(commands.add_parser(name, help=help_, description=help_, parents=[common]))
        else:
            commands.add_parser(name, help=help_, add_help=False)
    return top
