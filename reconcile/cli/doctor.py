"""`doctor`: checks of this machine and installation, by real operations in a temporary folder."""

from __future__ import annotations

import os
import secrets
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from modelstow.cas import BlobStore, CasError, Digest, LinkMode, locks
from modelstow.cas.links import Linker, LinkKind

from ..errors import ModelstowError
from ..hints import hint_of
from ..planning.observer import nearest_folder
from .output import size
from .session import Answer, Session

_PACKAGES = ("modelstow",)


@dataclass(frozen=True, slots=True)
class Check:
    """The result of one check."""

    name: str
    ok: bool
    message: str
    hint: str = ""


def run_doctor(session: Session) -> Answer:
    root = session.settings.root
    checks = [_python(), _packages(), _store(root), *_disk(root), _free(root)]
    rows = [{"name": c.name, "ok": c.ok, "message": c.message, "hint": c.hint} for c in checks]
    lines = []
    for check in checks:
        lines.append(f"{'ok  ' if check.ok else 'FAIL'}  {check.name}: {check.message}")
        lines += [f"      hint: {check.hint}"] if check.hint and not check.ok else []
    failed = [check.name for check in checks if not check.ok]
    error = ModelstowError(f"failed: {', '.join(failed)}", hint="see the hint of each check") if failed else None
    return Answer(document={"checks": rows}, lines=tuple(lines), error=error)


def _python() -> Check:
    return Check("python", sys.version_info >= (3, 11), sys.version.split()[0], "modelstow needs Python 3.11 or later")


def _packages() -> Check:
    """Check that no other distribution owns one of the names that this one imports."""
    import importlib.metadata

    owners = importlib.metadata.packages_distributions()
    others = {name: [d for d in owners.get(name, []) if d != "modelstow"] for name in _PACKAGES}
    conflicts = {name: found for name, found in others.items() if found}
    if conflicts:
        text = "; ".join(f"{name} also belongs to {', '.join(found)}" for name, found in conflicts.items())
        return Check("packages", False, text, "install modelstow into an environment of its own")
    return Check("packages", True, ", ".join(_PACKAGES))


def _store(root: Path) -> Check:
    try:
        store = BlobStore.open_existing(root)
    except (CasError, OSError) as error:
        return Check("store", False, str(error), hint_of(error))
    if store is None:
        return Check("store", True, f"{root} does not exist yet; the first reconcile makes it")
    kind = "shared with its group" if store.config.shared else "private"
    return Check("store", True, f"{root}, {kind}")


def _disk(root: Path) -> Iterator[Check]:
    """The abilities of the file system of ROOT, tried in a temporary folder."""
    here = nearest_folder(root)
    try:
        folder = Path(tempfile.mkdtemp(prefix=".modelstow-doctor-", dir=here))
    except OSError as error:
        hint = "choose another --root; a read-only store still serves status, plan, verify and a no-op ensure"
        yield Check("writable", False, f"{here}: {error.strerror}", hint)
        return
    try:
        yield Check("writable", True, str(here))
        yield _locks(folder)
        try:
            yield _links(folder)
        except OSError as error:
            yield Check("links", False, f"cannot be checked: {error.strerror}", "free some space, then run it again")
        yield _try("exchange of folders", lambda: _exchange(folder), "changed trees are updated file by file here")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _locks(folder: Path) -> Check:
    path = folder / "lock"
    try:
        with locks.acquire(path, doing="doctor", timeout_s=0):
            exclusive = locks.is_held(path)
    except (OSError, CasError) as error:
        return Check("locks", False, str(error), "work may be done twice here; gc requires --exclusive")
    if exclusive:
        return Check("locks", True, "a second holder is excluded")
    return Check("locks", False, "two processes can hold one lock", "work may be done twice; run gc with --exclusive")


def _links(folder: Path) -> Check:
    """The kinds of link that work, tried with real data: an empty file can be cloned where nothing else can."""
    data = secrets.token_bytes(64 << 10)
    digest, blob = Digest.of(data), folder / "blob"
    blob.write_bytes(data)
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    works = []
    try:
        for mode in (LinkMode.HARDLINK, LinkMode.REFLINK, LinkMode.SYMLINK, LinkMode.COPY):
            try:
                works.append(Linker(mode, strict=True).place(str(blob), digest, len(data), fd, mode.value))
            except (CasError, OSError):
                continue
    finally:
        os.close(fd)
    message = f"can {', '.join(works)}" if works else "no kind of link works"
    hint = "every tree will have its own copy; put the store on a file system with hardlinks"
    return Check("links", LinkKind.HARDLINK in works or LinkKind.REFLINK in works, message, hint)


def _exchange(folder: Path) -> None:
    from modelstow.cas import syscalls

    for name in ("a", "b"):
        (folder / name).mkdir()
    syscalls.exchange(str(folder / "a"), str(folder / "b"))


def _try(name: str, action: Callable[[], None], consequence: str) -> Check:
    try:
        action()
    except OSError as error:
        return Check(name, True, f"{error.strerror}: {consequence}")
    return Check(name, True, "in one step")


def _free(root: Path) -> Check:
    usage = shutil.disk_usage(nearest_folder(root))
    enough = usage.free > 1 << 30
    hint = "`modelstow gc` removes what nothing keeps"
    return Check("space", enough, f"{size(usage.free)} of {size(usage.total)} free", hint)
