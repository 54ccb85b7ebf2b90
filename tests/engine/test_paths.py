"""Paths of options, variables and manifests: `~` is the home folder, and what names none is refused."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from builders import CalledCli

from modelstow import InvalidConfigError, ModelEnsurer
from modelstow.reconcile.paths import absolute_path

pytestmark = pytest.mark.slow

MANIFEST = 'schema = 1\n[models.m]\nversion = "1"\nsources = ["~/w"]\n[models.m.variants.v]\n'


@pytest.fixture
def home(cli: CalledCli) -> Path:
    folder = cli.folder / "home"
    (folder / "w").mkdir(parents=True)
    (folder / "w/c.bin").write_bytes(b"weights")
    (cli.folder / "models.toml").write_text(MANIFEST)
    return folder


def test_a_tilde_is_the_home_folder(home: Path, monkeypatch: pytest.MonkeyPatch):
    """Variables are often set without a shell that would expand it."""
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(home)

    assert absolute_path("~") == str(home) and absolute_path("~/x/../y") == f"{home}/y"
    assert absolute_path("x~") == f"{home}/x~" and absolute_path("./~") == f"{home}/~"
    with pytest.raises(InvalidConfigError, match="no home folder ~nobody-of-this-name"):
        absolute_path("~nobody-of-this-name/x")


@pytest.mark.parametrize("given", ["MODELSTOW_ROOT", "MODELS_ROOT", "XDG_DATA_HOME", "--root"])
def test_no_folder_named_tilde_is_made(cli: CalledCli, home: Path, given: str):
    """Who removed it with `rm -rf ~` would lose the home folder. Sources of a manifest may be below it too."""
    environ = {"HOME": str(home), "MODELSTOW_ROOT": ""} | ({} if given == "--root" else {given: "~/models"})
    option = ["--root=~/models"] if given == "--root" else []
    store = home / "models" / ("modelstow" if given == "XDG_DATA_HOME" else "")

    for command in ("lock", "reconcile", "reconcile", "status"):
        cli.ok(command, *option, **environ)

    assert (store / "models/m@1/v/c.bin").read_bytes() == b"weights"
    assert not list(cli.folder.rglob("~*"))


def test_files_may_be_named_below_the_home_folder(cli: CalledCli, home: Path):
    """The lockfile, the manifest, the log, a mirror, a tree elsewhere, and the file of `which`."""
    os.rename(cli.folder / "models.toml", home / "models.toml")
    (home / "mirror").mkdir()
    environ = {"HOME": str(home), "MODELSTOW_LOCK": "~/my.lock", "MODELSTOW_MANIFEST": "~/models.toml"}
    cli.ok("lock", **environ)
    cli.ok("ensure", "m", "--into", "~/out", MODELSTOW_LOG="~/log.jsonl", MODELSTOW_MIRRORS="~/mirror", **environ)
    cli.ok("push", "m", "~/mirror", **environ)
    cli.ok("which", "~/out/c.bin", **environ)

    assert {"my.lock", "out", "log.jsonl"} <= set(os.listdir(home)) and any((home / "mirror").rglob("*"))
    assert not list(cli.folder.rglob("~*"))


def test_without_a_home_folder_it_says_what_to_set(cli: CalledCli, home: Path):
    """A container may run as a user that no password database knows: exit code 2, and no bug."""
    code = (
        "import os, pwd, sys\n"
        "def unknown(*of): raise KeyError(of)\n"
        "pwd.getpwuid = pwd.getpwnam = unknown\n"
        "os.environ.pop('HOME', None)\n"
        "from modelstow.reconcile.cli.main import main\n"
        "sys.exit(main(['ensure', 'm'], dict(os.environ)))\n"
    )
    cli.ok("lock", HOME=str(home))
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=cli.folder, env={"PATH": os.defpath}, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 2 and "MODELSTOW_ROOT" in ran.stderr and "bug" not in ran.stderr, ran.stderr


def test_a_log_that_cannot_be_opened_is_named_by_its_variable(cli: CalledCli, home: Path):
    """The path alone would not say where it comes from."""
    ran = cli.run("lock", HOME=str(home), MODELSTOW_LOG=f"{home}/no/x.log")
    assert ran.code == 2 and "MODELSTOW_LOG" in ran.err


def test_a_lease_on_a_store_that_cannot_be_written_to_is_an_error_with_a_code(
    cli: CalledCli, home: Path, monkeypatch: pytest.MonkeyPatch
):
    """A program that holds a model while it serves it learns why it cannot."""
    for command in ("lock", "reconcile"):
        cli.ok(command, HOME=str(home))
    models = ModelEnsurer.open(root=cli.root, lockfile=cli.folder / "models.lock")

    def refuse(*args: object, **more: object) -> None:
        raise OSError(30, "Read-only file system", str(cli.root))

    monkeypatch.setattr("modelstow.cas.leases.take", refuse)
    with pytest.raises(Exception, match="Read-only") as caught, models.lease("m"):
        pass
    assert getattr(caught.value, "code", "") == "PERMISSION_DENIED"
