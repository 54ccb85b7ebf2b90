"""`--into DIR`: several models may share a folder, each with paths of its own; what is the user's stays."""

from __future__ import annotations

from pathlib import Path

import pytest
from builders import CalledCli

pytestmark = pytest.mark.slow

SDXL = {"sdxl.safetensors": b"sdxl weights"}
SD15 = {"sd15.safetensors": b"sd15 weights", "sd15/config.json": b"{}"}
SD15_NEW = {"sd15.safetensors": b"sd15 weights, new", "sd15/new.json": b"[]"}


@pytest.fixture
def folder(cli: CalledCli) -> Path:
    models = {"sdxl@1": {"v": SDXL}, "sd15@1": {"v": SD15}, "other@1": {"v": {"sdxl.safetensors": b"other"}}}
    write_project(cli, models)
    folder = cli.folder / "checkpoints"
    folder.mkdir()
    (folder / "mine.safetensors").write_bytes(b"mine")
    return folder


def write_project(cli: CalledCli, models: dict[str, dict[str, dict[str, bytes]]]) -> None:
    """A lockfile over files of this disk, one folder for each model."""
    for model, variants in models.items():
        for path, data in variants["v"].items():
            target = cli.folder / "src" / model / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(data)
    tables = "".join(f'[models."{model}"]\nsources = ["src/{model}"]\n[models."{model}".variants.v]\n' for model in models)
    (cli.folder / "models.toml").write_text(f"schema = 1\n{tables}")
    cli.ok("lock")


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


MINE = {"mine.safetensors": b"mine"}


@pytest.mark.parametrize("at_once", [True, False])
def test_models_share_a_folder(cli: CalledCli, folder: Path, at_once: bool):
    """In one command or one after the other; nothing that is there goes."""
    for selectors in [["sdxl", "sd15"]] if at_once else [["sdxl"], ["sd15"]]:
        ran = cli.ok("ensure", *selectors, "--into", folder)
        assert ran.out.splitlines() == [str(folder)]

    assert content(folder) == {**MINE, **SDXL, **SD15}
    again = cli.ok("ensure", "sdxl", "--into", folder, "--json").json
    assert [tree["changed"] for tree in again["trees"]] == [False, False]
    cli.ok("gc")
    assert cli.ok("verify").code == 0 and content(folder) == {**MINE, **SDXL, **SD15}


def test_a_path_of_two_models_is_refused_and_names_both(cli: CalledCli, folder: Path):
    """Exit code 2, and nothing changed."""
    cli.ok("ensure", "sdxl", "--into", folder)
    before = content(folder)

    for selectors in (["other"], ["sd15", "other"]):
        ran = cli.run("ensure", *selectors, "--into", folder)
        assert ran.code == 2 and "sdxl@1#v" in ran.err and "other@1#v" in ran.err and "sdxl.safetensors" in ran.err

    assert content(folder) == before


def test_a_new_version_takes_the_place_of_the_old_and_of_nothing_else(cli: CalledCli, folder: Path):
    """Files that only the old one had go; those of the other model and of the user stay."""
    cli.ok("ensure", "sdxl", "sd15", "--into", folder)
    write_project(cli, {"sd15@2": {"v": SD15_NEW}})

    cli.ok("ensure", "sd15", "--into", folder)

    assert content(folder) == {**MINE, **SDXL, **SD15_NEW}
    trees = cli.ok("ensure", "sd15", "--into", folder, "--json").json["trees"]
    assert [(tree["model"], tree["state"]) for tree in trees] == [("sd15@2", "COMPLETE"), ("sdxl@1", "COMPLETE")]


def test_a_foreign_file_at_a_locked_path_is_moved_and_said(cli: CalledCli, folder: Path):
    """It is in quarantine, and in the report."""
    (folder / "sd15.safetensors").write_bytes(b"my own")
    cli.ok("ensure", "sdxl", "--into", folder)

    document = cli.ok("ensure", "sd15", "--into", folder, "--json").json

    (moved,) = document["displaced"]
    assert moved["path"].endswith("sd15.safetensors") and Path(moved["to"]).read_bytes() == b"my own"
    assert content(folder) == {**MINE, **SDXL, **SD15}


def test_what_one_model_lost_the_next_ensure_of_another_heals(cli: CalledCli, folder: Path):
    """The folder is one tree: each ensure makes it whole."""
    cli.ok("ensure", "sdxl", "sd15", "--into", folder)
    (folder / "sdxl.safetensors").unlink()

    cli.ok("ensure", "sd15", "--into", folder)

    assert content(folder) == {**MINE, **SDXL, **SD15}


def test_such_folders_are_shown_and_healed_by_reconcile(cli: CalledCli, folder: Path):
    """`status` and `ls` have a row for each model in it; a file that is missing is put back; the user's stay."""
    cli.ok("ensure", "sdxl", "sd15", "--into", folder)
    cli.ok("reconcile")
    assert cli.ok("status", "--check").out.count(str(folder)) == 2 and cli.ok("ls").out.count(str(folder)) == 2

    (folder / "sdxl.safetensors").unlink()
    assert cli.run("status", "--check").code == 3
    cli.ok("reconcile")
    assert content(folder) == {**MINE, **SDXL, **SD15}
    assert "in sync" in cli.ok("reconcile").out


def test_such_folders_are_brought_up_to_date_by_reconcile(cli: CalledCli, folder: Path):
    """After `lock` of a new version; what the lockfile no longer names stays as it is."""
    cli.ok("ensure", "sdxl", "sd15", "--into", folder)
    write_project(cli, {"sd15@2": {"v": SD15_NEW}})

    cli.ok("reconcile")

    assert content(folder) == {**MINE, **SDXL, **SD15_NEW}


def test_a_folder_that_was_deleted_is_no_tree_any_more(cli: CalledCli, folder: Path):
    """It is not made again, and keeps nothing."""
    cli.ok("ensure", "sdxl", "--into", folder)
    for path in sorted(folder.rglob("*"), reverse=True):
        path.unlink()
    folder.rmdir()

    cli.ok("reconcile")

    assert not folder.exists() and str(folder) not in cli.ok("status").out


def test_a_folder_can_be_evicted_by_its_path(cli: CalledCli, folder: Path):
    """What modelstow put there goes, what is the user's stays, and the folder is no tree any more."""
    cli.ok("ensure", "sdxl", "sd15", "--into", folder)

    cli.ok("evict", folder)

    assert content(folder) == MINE
    cli.ok("reconcile")
    assert content(folder) == MINE


def test_a_folder_can_be_released(cli: CalledCli, folder: Path):
    """All files stay, and belong to the user."""
    cli.ok("ensure", "sdxl", "--into", folder)

    cli.ok("release", folder)

    assert content(folder) == {**MINE, **SDXL}
    (folder / "sdxl.safetensors").unlink()
    cli.ok("reconcile")
    assert content(folder) == MINE and str(folder) not in cli.ok("status").out
    assert cli.run("release", folder).code == 2


def test_reconcile_prunes_no_folder_outside_the_store(cli: CalledCli, folder: Path):
    """The user's files in it are no leftovers of a tree; `ensure --into --prune` asks for that folder by name."""
    cli.ok("ensure", "sdxl", "--into", folder)
    (folder / "sdxl.safetensors").unlink()  # so that there is work in it

    cli.ok("reconcile", "--prune")
    cli.ok("ensure", "--all", "--prune")
    assert content(folder) == {**MINE, **SDXL}

    cli.ok("ensure", "sdxl", "--into", folder, "--prune")
    assert content(folder) == SDXL


def test_a_clash_after_an_upgrade_leaves_the_folder_as_it_is_and_is_said(cli: CalledCli, folder: Path):
    """The other trees are reconciled, and `status` works."""
    cli.ok("ensure", "sdxl", "sd15", "--into", folder)
    clashing = {"sdxl.safetensors": b"now sd15 has this path too"}
    write_project(cli, {"sdxl@1": {"v": SDXL}, "sd15@2": {"v": clashing}})

    ran = cli.ok("reconcile")

    assert "warning" in ran.err and "sdxl.safetensors" in ran.err and str(folder) in ran.err
    assert content(folder) == {**MINE, **SDXL, **SD15}
    assert (cli.root / "models/sd15@2/v/sdxl.safetensors").exists() and cli.run("status").code == 0


def test_a_damaged_record_of_such_a_folder_does_not_stop_status(cli: CalledCli, folder: Path):
    """It stops gc alone."""
    cli.ok("ensure", "sdxl", "--into", folder)
    record = next(file for file in (cli.root / "state/inventories").iterdir() if file.is_file())
    record.write_bytes(b"torn")

    assert cli.run("status").code == 0
