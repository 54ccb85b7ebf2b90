"""Ten times as many files are about ten times as much work, for every command."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from modelstow.reconcile import snapshot
from modelstow.reconcile.cli.main import main

FEW, MANY = 1_000, 10_000
MOST = 12  # times the work for ten times the files: a loop over files within a loop over files gives 100

COMMANDS: dict[str, list[str]] = {
    "lock": ["lock"],
    "lock again": ["lock"],
    "lock --upgrade": ["lock", "--upgrade"],
    "lock --check": ["lock", "--check"],
    "plan": ["plan"],
    "reconcile": ["reconcile"],
    "reconcile again": ["reconcile", "--connections", "2"],  # an option that the short way does not know
    "status": ["status", "--connections", "2"],
    "verify": ["verify"],
    "verify SEL": ["verify", "many", "--full"],
    "ensure --into": ["ensure", "many", "--into", "out"],
    "ls": ["ls"],
    "du": ["du"],
    "which": ["which", "out/d00/f00000.bin"],
    "diff": ["diff", "models.lock", "models.lock"],
    "push": ["push", "--all", "mirror"],
    "gc --dry-run": ["gc", "--dry-run"],
    "gc --explain": ["gc", "--explain", "many"],
    "gc --roots": ["gc", "--roots"],
    "pin": ["pin", "many"],
    "unpin": ["unpin", "many"],
    "evict": ["evict", "many"],
    "gc": ["gc", "--quarantine"],
}


class Steps:
    """Counts the lines of Python that run, in every thread: each iteration of a loop or comprehension is at least one.

    What a single call into C walks is not seen.
    """

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, frame: object, event: str, arg: object) -> Steps:
        self.count += 1
        return self

    def __enter__(self) -> Steps:
        threading.settrace(self)  # type: ignore[arg-type]
        sys.settrace(self)  # type: ignore[arg-type]
        return self

    def __exit__(self, *error: object) -> None:
        sys.settrace(None)
        threading.settrace(None)  # type: ignore[arg-type]


def steps(folder: Path, files: int, *, models: int) -> Iterator[tuple[str, int]]:
    """Each command's steps in a fresh project with *files* distinct small files, in so many models."""
    manifest = ["schema = 1"]
    for model in range(models):
        name, source = f"many{model}" if model else "many", f"src/m{model}"
        manifest += [f"[models.{name}]", 'version = "1"', f'sources = ["{source}"]', f"[models.{name}.variants.all]"]
        for number in range(model, files, models):
            path = folder / source / f"d{number // models % 50:02}/f{number:05}.bin"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"%d" % number)
    (folder / "models.toml").write_text("\n".join([*manifest, ""]))
    (folder / "mirror").mkdir()
    environ = {"MODELSTOW_ROOT": str(folder / "store"), "HOME": str(folder)}
    for name, argv in COMMANDS.items():
        with Steps() as counted:
            code = main(argv, environ)
        assert code == 0, name
        yield name, counted.count


@pytest.mark.slow
@pytest.mark.timeout(1200)  # about half a minute, but of counting alone: a machine with other work takes many times that
@pytest.mark.parametrize("files_each", [None, 10], ids=["one model", "ten files a model"])
def test_ten_times_the_files_are_not_more_than_twelve_times_the_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], files_each: int | None
):
    """Nothing walks all files for each file; all commands that do are reported together."""
    # Whether a command takes a snapshot depends on how long ago its trees changed: here each one does, on any machine.
    monkeypatch.setattr(snapshot, "_RACY_NS", -(10**15))
    found: dict[int, dict[str, int]] = {}
    for files in (FEW, MANY):
        folder = tmp_path / str(files)
        folder.mkdir()
        monkeypatch.chdir(folder)
        found[files] = dict(steps(folder, files, models=files // files_each if files_each else 1))
        capsys.readouterr()

    ratios = {name: found[MANY][name] / found[FEW][name] for name in COMMANDS}

    assert {name: round(ratio, 1) for name, ratio in ratios.items() if ratio > MOST} == {}
