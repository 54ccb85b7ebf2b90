"""The grammar of the command line. Options are accepted after the command."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from typing import Any, NoReturn

_Add = Callable[[str, str], argparse.ArgumentParser]
VARIANT = "default"
"""The variant that `add` makes where none is named."""


class _Parser(argparse.ArgumentParser):
    """Complains by raising, so that the output can be JSON too; takes options by their whole names only."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        from ..errors import InvalidConfigError

        raise InvalidConfigError(message, hint=_hint(message) or f"see `{self.prog} --help`")


def _hint(message: str) -> str:
    """What was probably meant; empty where nobody can tell."""
    if match := re.search(r"argument COMMAND: invalid choice: '([^']*)' \(choose from (.*)\)", message, re.DOTALL):
        import difflib

        near = difflib.get_close_matches(match[1], re.findall(r"'?([\w-]+)'?", match[2]), n=1)
        return f"did you mean `{near[0]}`?" if near else "a command comes first, and its options after it"
    if message.startswith("the following arguments are required: COMMAND"):
        return "a command comes first, e.g. `modelstow status`; see `modelstow --help`"
    if message.startswith("unrecognized arguments: -"):
        return "a command comes first, and its options after it; see `modelstow COMMAND --help`"
    if message.startswith("unrecognized arguments: "):
        return "see `modelstow COMMAND --help`; for some models only there is `modelstow ensure SEL`"
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
    how.add_argument("--connections", metavar="N", help="transfers at once, at most (MODELSTOW_CONCURRENCY)")
    how.add_argument("--limit-rate", metavar="RATE", help="bytes a second from sources, e.g. 50MB")
    how.add_argument("--lock-timeout", metavar="SECONDS", help="how long to wait without progress for others (300)")
    say = common.add_argument_group("output")
    say.add_argument("--json", action="store_true", help="one JSON document on stdout")
    say.add_argument("--quiet", "-q", action="store_true", help="no talk on stderr")
    say.add_argument("--verbose", "-v", action="store_true", help="more talk; tracebacks")
    say.add_argument("--no-progress", action="store_true", help="no progress bars (MODELSTOW_NO_PROGRESS)")
    say.add_argument("--progress", choices=["auto", "json"], default="auto", help="json: one event a line on stderr")
    return common


def build_parser(version: str) -> argparse.ArgumentParser:
    """The whole grammar."""
    top = _Parser(prog="modelstow", description="Model files kept the way a package manager keeps packages.")
    top.add_argument("--version", action="version", version=f"modelstow {version}")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=_Parser)
    common = _common()

    def add(name: str, help_: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=help_, description=help_, parents=[common])

    _manifest_commands(add)
    _disk_commands(add)
    _keeping_commands(add)
    _exchange_commands(add)
    _looking_commands(add)
    return top


def _manifest_commands(add: _Add) -> None:
    init = add("init", "write a commented models.toml")
    init.add_argument("--shared", action="store_true", help="also make the store at --root, writable for its group")
    add_ = add("add", "add a model from a locator to models.toml")
    add_.add_argument("locator", metavar="LOCATOR", help="a folder, http(s)://, hf:// or s3://")
    add_.add_argument("--name", help="the model's name (default: from the locator)")
    add_.add_argument("--model-version", metavar="VERSION", help="its version (as the locator ends, or 1.0.0)")
    add_.add_argument("--variant", default=VARIANT, help=f"the variant's name ({VARIANT})")
    add_.add_argument("--include", action="append", default=[], metavar="GLOB", help="files to take; may be repeated")
    add_.add_argument("--exclude", action="append", default=[], metavar="GLOB", help="files to leave; may be repeated")
    remove = add("remove", "remove a model from models.toml")
    remove.add_argument("name", metavar="NAME", help="name or name@version")
    lock = add("lock", "resolve models.toml into models.lock")
    lock.add_argument("--check", action="store_true", help="write nothing; exit 7 if the lockfile is stale")
    lock.add_argument("--upgrade", nargs="?", const="", metavar="NAME", help="list sources anew, of all models or one")


def _disk_commands(add: _Add) -> None:
    plan = add("plan", "print what reconcile would do; changes nothing")
    plan.add_argument("selectors", nargs="*", metavar="SEL", help="name[@version][#variant]; default: all")
    plan.add_argument("--check", action="store_true", help="exit 3 if there is work")
    _link_options(plan)
    reconcile = add("reconcile", "make the disk equal the lockfile")
    reconcile.add_argument("--watch", metavar="SECONDS", help="keep it so, looking every so many seconds")
    reconcile.add_argument("--prune", action="store_true", help="also remove files in trees that nobody locked")
    reconcile.add_argument("--dry-run", action="store_true", help="print the plan instead")
    _link_options(reconcile)
    ensure = add("ensure", "make some variants ready; prints their paths")
    ensure.add_argument("selectors", nargs="*", metavar="SEL", help="name[@version][#variant]")
    ensure.add_argument("--all", action="store_true", help="every variant of the lockfile")
    ensure.add_argument("--force", action="store_true", help="fetch every blob anew")
    ensure.add_argument("--into", metavar="DIR", help="make DIR the tree of the one selector")
    ensure.add_argument(
        "--with", dest="with_", action="append", default=[], metavar="COMPONENT", help="add an optional part"
    )
    ensure.add_argument("--without", action="append", default=[], metavar="COMPONENT", help="leave a part out")
    ensure.add_argument("--prune", action="store_true", help="also remove files in the trees that nobody locked")
    ensure.add_argument("--dry-run", action="store_true", help="print the plan instead")
    _link_options(ensure)
    status = add("status", "how each variant stands, by stat")
    status.add_argument("selectors", nargs="*", metavar="SEL", help="default: all")
    status.add_argument("--check", action="store_true", help="exit 3 unless all are COMPLETE")
    verify = add("verify", "re-read content against the piece tables")
    verify.add_argument("selectors", nargs="*", metavar="SEL", help="default: every blob and registered tree")
    level = verify.add_mutually_exclusive_group()
    level.add_argument("--full", action="store_true", help="against sha256")
    level.add_argument("--quick", action="store_true", help="by stat only")
    verify.add_argument("--repair", action="store_true", help="fetch the damaged pieces anew")


def _link_options(command: argparse.ArgumentParser) -> None:
    modes = "hardlink, reflink, symlink, copy, auto"
    command.add_argument("--link-mode", metavar="MODE", help=f"{modes} (MODELSTOW_LINK_MODE)")
    command.add_argument("--strict-links", action="store_true", help="fail where the link mode cannot be had")


def _keeping_commands(add: _Add) -> None:
    gc = add("gc", "remove blobs that nothing keeps; evict on request")
    gc.add_argument("--max-size", metavar="SIZE", help="evict least recently used trees until blobs fit, e.g. 500GB")
    gc.add_argument("--free", metavar="SIZE", help="evict until so much is free, e.g. 50GB")
    gc.add_argument("--max-age", metavar="AGE", help="evict trees unused for so long, e.g. 30d")
    gc.add_argument("--dry-run", action="store_true", help="remove nothing, say what would go")
    gc.add_argument("--quarantine", action="store_true", help="empty quarantine/ too")
    gc.add_argument("--state-lost", action="store_true", help="go on although state/ was lost")
    gc.add_argument("--exclusive", action="store_true", help="nobody else uses this store (file systems where locks lie)")
    gc.add_argument("--roots", action="store_true", help="list what keeps blobs")
    gc.add_argument("--forget", metavar="ROOT", help="drop one root, by its id or path")
    gc.add_argument("--explain", metavar="DIGEST|SEL", help="say what keeps a blob or variant")
    evict = add("evict", "remove a tree; what only it kept goes with the next gc")
    evict.add_argument("selectors", nargs="+", metavar="SEL")
    evict.add_argument("--dry-run", action="store_true", help="remove nothing, say what would go")
    for name, what in (("pin", "keep a variant from eviction"), ("unpin", "let a variant be evicted again")):
        add(name, what).add_argument("selectors", nargs="+", metavar="SEL")


def _exchange_commands(add: _Add) -> None:
    push = add("push", "publish blobs to a mirror")
    push.add_argument("selectors", nargs="*", metavar="SEL", help="name[@version][#variant]")
    push.add_argument("--all", action="store_true", help="every variant of the lockfile")
    push.add_argument("url", metavar="URL", help="a folder, file:// or s3://bucket/prefix")
    push.add_argument("--compress", action="store_true", help="zstd-coded pieces, where that saves a tenth")
    push.add_argument("--dry-run", action="store_true", help="send nothing, say what would be sent")


def _looking_commands(add: _Add) -> None:
    add("ls", "what is locked and present").add_argument("selectors", nargs="*", metavar="SEL")
    add("du", "logical, physical and shared bytes").add_argument("selectors", nargs="*", metavar="SEL")
    add("which", "which blob, models and trees own a file").add_argument("path", metavar="PATH")
    diff = add("diff", "what an upgrade would fetch, keep and drop")
    diff.add_argument("old", metavar="OLD.lock")
    diff.add_argument("new", metavar="NEW.lock")
    add("doctor", "check this machine and installation")
    bench = add("bench", "measure verification throughput here")
    bench.add_argument("--size", default="1GiB", metavar="SIZE", help="bytes of the file to measure with (1GiB)")
    bench.add_argument("--repeats", default="3", metavar="N", help="how often each row is measured (3)")
