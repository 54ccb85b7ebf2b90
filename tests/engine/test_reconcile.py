"""What reconcile and ensure do to a store, by the real command line or the Python face over real folders."""

import os
from pathlib import Path

import pytest
from builders import (
    Cli,
    assert_sound,
    blobs_of,
    ensurer_of,
    leftovers,
    lock_of,
    manifest_of,
    memory,
    objects_of,
    some_bytes,
    tree_of,
    write_lock,
)

from modelstow import EnsureOptions, InvalidConfigError, ModelEnsurer, ModelState
from modelstow.backends.memory import MemorySource
from modelstow.cas import BlobStore, Digest, NoSpaceError
from modelstow.cas.scrub import Level
from modelstow.reconcile.checkout.publisher import Publisher
from modelstow.reconcile.errors import FilesystemError
from modelstow.reconcile.events.events import FetchStarted
from modelstow.reconcile.planning import verifier
from modelstow.reconcile.planning.planner import Fetch

pytestmark = pytest.mark.slow

BIG = some_bytes(20_000_000, 1)
HALF = some_bytes(9_000_000, 2)
CONFIG = b'{"hidden": 384}'
FP32 = {"config.json": CONFIG, "model.bin": BIG, "deep/er/vocab.txt": b"a\nb\n", "empty": b""}
FP16 = {"config.json": CONFIG, "model.bin": HALF}


def two_variants():
    lock = lock_of({"m@1.0.0": {"fp32": FP32, "fp16": FP16}}, default="fp32")
    # Both variants call their weights model.bin, so each blob has a locator of its own.
    objects = objects_of(FP32) | {"mem://origin/m/model.bin": BIG}
    blobs = dict(lock.blobs)
    half = Digest.of(HALF)
    blobs[half] = type(blobs[half])(size=len(HALF), urls=("mem://origin/m/model.fp16.bin",))
    from dataclasses import replace

    return replace(lock, blobs=blobs), MemorySource(objects | {"mem://origin/m/model.fp16.bin": HALF})


def test_reconcile_fetches_both_variants_and_shares_their_bytes(tmp_path: Path):
    """Equal files of two variants are one inode; each blob is fetched once."""
    lock, source = two_variants()
    models = ensurer_of(tmp_path, lock, source)

    outcome = models.reconcile()

    fp32, fp16 = models.local_path("m", "fp32"), models.local_path("m", "fp16")
    assert tree_of(fp32) == FP32 and tree_of(fp16) == FP16
    assert (fp32 / "config.json").stat().st_ino == (fp16 / "config.json").stat().st_ino
    assert outcome.report.fetched_bytes == len(BIG) + len(HALF) + len(CONFIG) + 4
    assert leftovers(tmp_path / "root") == []
    assert_sound(tmp_path / "root")


def test_a_second_reconcile_does_nothing(tmp_path: Path):
    """No request, no lock, no write but of caches and of when a tree was used."""
    lock, source = two_variants()
    models = ensurer_of(tmp_path, lock, source)
    models.reconcile()
    asked = source.opened

    def times() -> dict[Path, int]:
        caches = (tmp_path / "root/state/used", tmp_path / "root/state/snapshots")
        every = [p for p in (tmp_path / "root").rglob("*") if not {p, p.parent} & set(caches) and p.name != "state"]
        return {p: p.lstat().st_ctime_ns for p in every}

    before = times()

    outcome = models.reconcile()

    assert not any(tree.changed for tree in outcome.trees)
    assert source.opened == asked
    assert times() == before


def test_an_edit_through_a_hardlink_is_found_and_only_its_piece_is_fetched(tmp_path: Path):
    """One flipped byte costs one ranged request of 8 MiB; the damaged inode goes to quarantine; both trees heal."""
    lock32 = lock_of({"m@1.0.0": {"fp32": FP32}, "n@2": {"x": {"weights": BIG}}})
    models = ensurer_of(tmp_path, lock32, memory(FP32 | {"weights": BIG}))
    models.reconcile()
    path = models.local_path("m")
    os.chmod(path / "model.bin", 0o644)
    with open(path / "model.bin", "r+b") as file:
        file.seek(10_000_000)
        file.write(b"edited")

    assert models.status("m").state is ModelState.CORRUPT
    assert models.status("m").corrupt_files == ("model.bin",)
    assert models.status("n").state is ModelState.CORRUPT
    outcome = models.ensure_all(["m"])

    assert outcome.report.repaired_bytes == 8 << 20
    assert outcome.report.repairs[0].pieces == (1,)
    assert tree_of(path) == FP32
    assert (models.local_path("n") / "weights").read_bytes() == BIG, "the tree that was not asked for is repaired too"
    assert models.status("n").state is ModelState.COMPLETE
    assert_sound(tmp_path / "root")
    assert len(list((tmp_path / "root/quarantine").iterdir())) == 1


def test_a_touched_blob_costs_reading_not_fetching(tmp_path: Path):
    """A restored backup or a touch(1) changes the mtime, not the bytes (D11)."""
    lock, source = two_variants()
    models = ensurer_of(tmp_path, lock, source)
    models.reconcile()
    asked = source.opened
    os.utime(models.local_path("m") / "model.bin")

    assert models.status("m").state is ModelState.CORRUPT
    models.ensure("m")

    assert models.status("m").state is ModelState.COMPLETE
    assert source.opened == asked


def test_a_restored_backup_of_a_whole_store_is_proved_again_not_fetched(tmp_path: Path):
    """`cp -a` without --preserve=links gives every file an inode of its own; content decides (D11)."""
    lock, source = two_variants()
    models = ensurer_of(tmp_path, lock, source)
    models.reconcile()
    import shutil

    shutil.copytree(tmp_path / "root", tmp_path / "restored", symlinks=True)
    shutil.rmtree(tmp_path / "root")
    (tmp_path / "restored").rename(tmp_path / "root")
    asked = source.opened

    outcome = models.reconcile()

    assert outcome.error is None and source.opened == asked
    assert all(models.status("m", v).state is ModelState.COMPLETE for v in ("fp32", "fp16"))
    assert (models.local_path("m", "fp32") / "config.json").stat().st_nlink == 3
    assert not list((tmp_path / "root/quarantine").iterdir())


def test_a_file_of_unknown_origin_is_adopted_if_it_is_right(tmp_path: Path):
    """No request is made for bytes that are there already; until then status does not report them as complete."""
    models = ensurer_of(tmp_path, lock_of({"m@1": {"v": FP32}}), MemorySource({}))
    for path, data in FP32.items():
        (models.local_path("m") / path).parent.mkdir(parents=True, exist_ok=True)
        (models.local_path("m") / path).write_bytes(data)
    seen = models.status("m")

    path = models.ensure("m")

    assert seen.state is ModelState.PARTIAL and seen.bytes_needed == 0
    assert tree_of(path) == FP32 and models.status("m").state is ModelState.COMPLETE
    assert_sound(tmp_path / "root")


def test_a_wrong_file_at_a_locked_path_is_moved_to_quarantine_and_reported(tmp_path: Path):
    """The file may be the only copy of the user's work."""
    models = ensurer_of(tmp_path, lock_of({"m@1": {"v": FP16}}), memory(FP16))
    models.local_path("m").mkdir(parents=True)
    (models.local_path("m") / "config.json").write_text("mine")

    outcome = models.ensure_all(["m"])

    assert tree_of(models.local_path("m")) == FP16
    [moved] = outcome.report.displaced
    assert moved.to.read_text() == "mine"


def test_the_users_files_stay_through_upgrade_prune_excepted(tmp_path: Path):
    """Extra files move into the new tree; --prune removes them."""
    models = ensurer_of(tmp_path, lock_of({"m@1": {"v": FP16}}), memory(FP16))
    path = models.ensure("m")
    (path / "notes").mkdir()
    (path / "notes/mine.txt").write_text("keep me")
    (path / "adapter").mkdir()

    changed = {"config.json": b"{}", "model.bin": HALF, "new.txt": b"new"}
    again = ensurer_of(tmp_path, lock_of({"m@1": {"v": changed}}), memory(changed))
    outcome = again.ensure_all(["m"])

    assert tree_of(path) == changed | {"notes/mine.txt": b"keep me"}
    assert (path / "adapter").is_dir()
    assert outcome.report.published[0].exchanged
    assert again.status("m").extra_files == ("notes/mine.txt",)
    pruned = again.ensure_all(["m"], options=EnsureOptions(prune=True))
    assert tree_of(path) == changed and pruned.trees[0].changed


def test_an_upgrade_switches_the_name_in_one_step_and_keeps_the_old_links_for_readers(tmp_path: Path):
    """A process that holds the old folder open can read it for another hour."""
    models = ensurer_of(tmp_path, lock_of({"m@1": {"v": FP16}}), memory(FP16))
    path = models.ensure("m")
    inside = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    changed = {"config.json": b"{}", "model.bin": BIG}

    ensurer_of(tmp_path, lock_of({"m@1": {"v": changed}}), memory(changed)).ensure("m")

    old = os.open("config.json", os.O_RDONLY, dir_fd=inside)
    assert os.read(old, 100) == CONFIG
    assert tree_of(path) == changed


def test_what_a_lockfile_no_longer_names_is_removed_by_reconcile(tmp_path: Path):
    """The tree goes, the user's file in it stays, the blobs stay until gc."""
    models = ensurer_of(tmp_path, lock_of({"m@1": {"v": FP16}, "n@1": {"v": {"n": b"n"}}}), memory(FP16 | {"n": b"n"}))
    models.reconcile()
    path = models.local_path("m")
    (path / "mine").write_text("x")

    again = ensurer_of(tmp_path, lock_of({"n@1": {"v": {"n": b"n"}}}), memory({"n": b"n"}))
    outcome = again.reconcile()
    collected = again.collect_garbage()

    assert [gone.path for gone in outcome.report.removed] == [path]
    assert tree_of(path) == {"mine": b"x"}
    assert set(collected.blobs) == {Digest.of(data) for data in FP16.values()}
    assert collected.reclaimed_bytes == sum(map(len, FP16.values()))
    assert set(blobs_of(tmp_path / "root")) == {Digest.of(b"n").hex}


def test_nothing_is_removed_if_something_failed(tmp_path: Path):
    """A reconcile that could not finish leaves the old trees alone."""
    models = ensurer_of(tmp_path, lock_of({"m@1": {"v": FP16}}), memory(FP16))
    models.reconcile()

    again = ensurer_of(tmp_path, lock_of({"n@1": {"v": {"n": b"n"}}}), MemorySource({}))
    outcome = again.reconcile()

    assert outcome.error is not None and outcome.error.code == "INCOMPLETE_DOWNLOAD"
    assert tree_of(models.local_path("m")) == FP16


def test_two_lockfiles_share_a_root_and_keep_their_own(tmp_path: Path):
    """What another registered lockfile wants is neither removed nor collected; other content is refused."""
    first = ensurer_of(tmp_path / "a", lock_of({"m@1": {"v": FP16}}), memory(FP16))
    shared = first.settings.root
    first.reconcile()

    def second(models, files):
        from dataclasses import replace

        made = ensurer_of(tmp_path / "b", lock_of(models), memory(files))
        made.settings = replace(made.settings, root=shared)
        return made

    other = second({"n@1": {"v": {"n": b"n"}}}, {"n": b"n"})
    other.reconcile()
    assert tree_of(first.local_path("m")) == FP16
    assert other.collect_garbage().blobs == []

    clash = second({"m@1": {"v": {"config.json": b"other"}}}, {"config.json": b"other"})
    with pytest.raises(InvalidConfigError, match="other content"):
        clash.reconcile()


def test_into_makes_a_folder_the_tree_of_one_variant(tmp_path: Path):
    """Files that were there stay and are the user's; gc keeps what the folder holds until it is gone."""
    models = ensurer_of(tmp_path, lock_of({"m@1": {"v": FP16}}), memory(FP16))
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine").write_text("x")

    path = models.ensure("m", into=tmp_path / "out")

    assert path == tmp_path / "out"
    assert tree_of(path) == FP16 | {"mine": b"x"}
    assert not models.local_path("m").exists()
    assert models.collect_garbage().blobs == []
    import shutil

    shutil.rmtree(path)
    assert len(models.collect_garbage().blobs) == 2


def test_optional_components_are_there_when_asked_for_and_remembered(tmp_path: Path):
    """--with adds, a later ensure keeps it, --without takes it away."""
    from dataclasses import replace

    lock = lock_of({"m@1": {"v": FP32}})
    variant = lock.models["m@1"].variants["v"]
    parts = replace(variant, components={"vocab": ("deep/er/vocab.txt",)}, optional=("vocab",))
    lock = replace(lock, models={"m@1": replace(lock.models["m@1"], variants={"v": parts})})
    models = ensurer_of(tmp_path, lock, memory(FP32))
    small = {path: data for path, data in FP32.items() if path != "deep/er/vocab.txt"}

    path = models.ensure("m")
    assert tree_of(path) == small and models.status("m").state is ModelState.COMPLETE
    models.ensure("m", with_=["vocab"])
    assert tree_of(path) == FP32
    models.ensure("m")
    assert tree_of(path) == FP32
    models.ensure("m", without=["vocab"])
    assert tree_of(path) == small
    with pytest.raises(InvalidConfigError, match="no component"):
        models.ensure("m", with_=["vae"])


@pytest.mark.parametrize("mode", ["hardlink", "symlink", "copy", "reflink", "auto"])
def test_every_link_mode_gives_a_valid_tree_that_can_be_repaired(cli: Cli, mode: str):
    """An unavailable mode falls back and is counted; a second run has nothing to do; a damaged file is repaired."""
    source = cli.folder / "src"
    for path, data in FP32.items():
        (source / path).parent.mkdir(parents=True, exist_ok=True)
        (source / path).write_bytes(data)
    lock = write_lock(cli.folder, lock_of({"m@1": {"v": FP32}}, sources=["src"]))

    first = cli.ok("ensure", "m", "--link-mode", mode, "--json").json
    again = cli.ok("ensure", "m", "--link-mode", mode, "--json").json
    path = Path(first["trees"][0]["path"])

    assert tree_of(path) == FP32
    assert sum(first["summary"]["links"].values()) == 3, "the empty file counts as none"
    assert not again["trees"][0]["changed"]
    os.chmod(path / "config.json", 0o644)
    (path / "config.json").write_bytes(b"edited by hand!")
    assert cli.run("status", "--check").code == 3
    cli.ok("ensure", "m", "--link-mode", mode)
    assert tree_of(path) == FP32
    assert lock.exists()


def test_strict_links_make_a_fall_back_an_error(cli: Cli):
    """A reflink that cannot be had is not silently a copy."""
    (cli.folder / "src").mkdir()
    (cli.folder / "src/config.json").write_bytes(CONFIG)
    write_lock(cli.folder, lock_of({"m@1": {"v": {"config.json": CONFIG}}}, sources=["src"]))

    ran = cli.run("ensure", "m", "--link-mode", "reflink", "--strict-links", "--json")

    if ran.code == 0:
        pytest.skip("this file system has reflinks")
    assert ran.json["error"]["code"] == "FILESYSTEM_ERROR" and "reflink" in ran.json["error"]["message"]


def test_a_folder_where_a_file_should_be_is_moved_not_deleted(tmp_path: Path):
    """And so is a file where a folder should be (F10)."""
    models = ensurer_of(tmp_path, lock_of({"m@1": {"v": FP32}}), memory(FP32))
    path = models.local_path("m")
    (path / "config.json").mkdir(parents=True)
    (path / "config.json/inner").write_text("mine")
    (path / "deep").write_text("a file")

    models.ensure("m")

    assert tree_of(path) == FP32
    kept = [p.read_text() for p in (tmp_path / "root/quarantine").rglob("*") if p.is_file()]
    assert sorted(kept) == ["a file", "mine"]


def test_a_symlink_in_a_tree_is_not_followed(tmp_path: Path):
    """Nothing is written outside, wherever a link leads (L11)."""
    models = ensurer_of(tmp_path, lock_of({"m@1": {"v": FP32}}), memory(FP32))
    outside = tmp_path / "outside"
    outside.mkdir()
    path = models.local_path("m")
    path.mkdir(parents=True)
    (path / "deep").symlink_to(outside)
    (path / "config.json").symlink_to(outside / "config.json")

    models.ensure("m")

    assert tree_of(path) == FP32 and list(outside.iterdir()) == []
    assert not (path / "deep").is_symlink()


def test_a_blob_that_vanished_is_taken_back_from_its_tree(tmp_path: Path):
    """The inode lives on in the tree: no request is made."""
    models = ensurer_of(tmp_path, lock_of({"m@1": {"v": FP16}}), memory(FP16))
    models.ensure("m")
    for path in blobs_of(tmp_path / "root").values():
        path.unlink()

    again = ensurer_of(tmp_path, lock_of({"m@1": {"v": FP16}}), MemorySource({}))
    again.ensure("m")

    assert again.status("m").state is ModelState.COMPLETE
    assert_sound(tmp_path / "root")


def test_progress_never_falls_and_ends_with_the_two_equal(tmp_path: Path):
    """Bytes done and bytes in all of what has to be fetched."""
    seen: list[tuple[int, int]] = []
    models = ensurer_of(tmp_path, lock_of({"m@1": {"v": FP32}}), memory(FP32))

    models.ensure("m", progress_callback=lambda done, total: seen.append((done, total)))

    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1] == (sum(map(len, FP32.values())),) * 2


def test_force_fetches_every_blob_again_without_removing_the_good_tree(tmp_path: Path):
    """The tree's inodes stay where they are when the bytes turn out the same."""
    source = memory(FP16)
    models = ensurer_of(tmp_path, lock_of({"m@1": {"v": FP16}}), source)
    path = models.ensure("m")
    ino = (path / "model.bin").stat().st_ino
    asked = source.opened

    models.ensure("m", force_redownload=True)

    assert source.opened == asked + 2
    assert (path / "model.bin").stat().st_ino == ino and tree_of(path) == FP16


def test_mirrors_are_asked_first_and_trusted_never(cli: Cli):
    """Any folder laid out like blobs/ serves; wrong bytes in it cost another request, and the source is asked."""
    (cli.folder / "src").mkdir()
    for path, data in FP16.items():
        (cli.folder / "src" / path).write_bytes(data)
    write_lock(cli.folder, lock_of({"m@1": {"v": FP16}}, sources=["src"]))
    cli.ok("reconcile")
    (cli.root / "blobs").rename(cli.folder / "mirror")
    for path in (cli.folder / "src").iterdir():
        path.unlink()
    damaged = next(path for path in (cli.folder / "mirror").rglob(Digest.of(CONFIG).hex))
    damaged.chmod(0o644)
    damaged.write_bytes(b"x" * len(CONFIG))
    (cli.folder / "src/config.json").write_bytes(CONFIG)
    import shutil

    shutil.rmtree(cli.root)

    done = cli.ok("reconcile", "--json", MODELSTOW_MIRRORS=str(cli.folder / "mirror")).json

    assert tree_of(cli.root / "models/m@1/v") == FP16
    assert done["summary"]["fetched_bytes"] == len(HALF) + 2 * len(CONFIG)


def test_verify_of_what_is_only_missing_or_drifted_is_no_failure(cli: Cli):
    """Exit 3, changes needed, as for --check: faults are listed, and `ok` is false only next to an error."""
    write_lock(cli.folder, lock_of({"m@1": {"v": {"a": b"a", "b": b"bb"}}}, sources=["src"]))
    (cli.folder / "src").mkdir()
    for path, data in (("a", b"a"), ("b", b"bb")):
        (cli.folder / "src" / path).write_bytes(data)
    cli.ok("reconcile")
    tree = cli.root / "models/m@1/v"
    (tree / "a").unlink()
    (tree / "b").unlink()
    (tree / "b").write_bytes(b"mine")

    ran = cli.run("verify", "--json")

    assert ran.code == 3 and ran.json["ok"] is True and "error" not in ran.json
    assert {fault["kind"] for fault in ran.json["faults"]} <= {"missing", "drift"} and len(ran.json["faults"]) == 2


def test_a_plan_that_refetches_is_carried_out_as_planned(tmp_path: Path):
    """What `apply` does is what `plan` reported, forced or not."""
    lock, source = two_variants()
    models = ensurer_of(tmp_path, lock, source)
    models.ensure("m", "fp16")
    forced = models.plan(["m#fp16"], force=True)

    report = models.apply(forced)

    assert forced.summary.fetch_bytes == report.fetched_bytes == len(HALF) + len(CONFIG)


def test_the_repair_of_a_blob_without_a_tree_makes_sure_of_room(tmp_path: Path):
    """It is planned like any other: nothing is fetched where it cannot fit."""
    lock, source = two_variants()
    models = ensurer_of(tmp_path, lock, source)
    path = models.ensure("m", "fp16")
    blob = blobs_of(tmp_path / "root")[Digest.of(HALF).hex]
    for file in path.iterdir():
        file.unlink()
    path.rmdir()
    blob.chmod(0o644)
    blob.write_bytes(HALF[::-1])
    models.free_bytes = lambda: 1000

    with pytest.raises(NoSpaceError):
        models.verify(None, Level.FULL, repair=True)

    models.free_bytes = None
    _, outcome = models.verify(None, Level.FULL, repair=True)
    assert outcome is not None and blobs_of(tmp_path / "root")[Digest.of(HALF).hex].read_bytes() == HALF


@pytest.mark.parametrize("command", [("push", "m", "mirror"), ("lock", "--upgrade"), ("gc",), ("ensure", "m")])
def test_no_command_waits_longer_for_a_lock_than_its_time_out(cli: Cli, command: tuple[str, ...]):
    """--lock-timeout holds for every lock of every command, that of the store too (exit 10)."""
    (cli.folder / "src").mkdir()
    (cli.folder / "src/model.bin").write_bytes(b"weights")
    (cli.folder / "models.toml").write_text(manifest_of("src"))
    cli.ok("lock")
    cli.ok("ensure", "m")
    (cli.folder / "src/model.bin").write_bytes(b"others!")
    if command[0] == "ensure":
        cli.ok("lock", "--upgrade")
    store = BlobStore.open(cli.root)

    with store.lock("gate", doing="a test"):
        refused = cli.run(*command, "--lock-timeout", "0")

    assert refused.code == 10, refused


def test_the_environment_names_the_manifest_for_python_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Relative locators are relative to it, in Python as in the command line."""
    (tmp_path / "a/src").mkdir(parents=True)
    (tmp_path / "a/src/w").write_bytes(CONFIG)
    (tmp_path / "b").mkdir()
    write_lock(tmp_path / "b", lock_of({"m@1": {"v": {"w": CONFIG}}}, sources=["src"]))
    monkeypatch.setenv("MODELSTOW_MANIFEST", str(tmp_path / "a/models.toml"))
    monkeypatch.setenv("MODELSTOW_LOCK", str(tmp_path / "b/models.lock"))

    path = ModelEnsurer.open(tmp_path / "root").ensure("m")

    assert tree_of(path) == {"w": CONFIG}


def test_a_scheme_is_one_in_any_case(tmp_path: Path, cli: Cli):
    """People write HTTPS:// and FILE://; the lockfile does not."""
    (cli.folder / "src").mkdir()
    (cli.folder / "src/a #b%.txt").write_bytes(b"x")
    (cli.folder / "models.toml").write_text(manifest_of(f"FILE://{cli.folder}/src"))
    cli.ok("lock")
    cli.ok("ensure", "m")

    assert "FILE://" not in (cli.folder / "models.lock").read_text()


@pytest.mark.parametrize("level", [Level.FAST, Level.FULL])
def test_a_write_while_a_verification_reads_is_found_by_the_same_verification(tmp_path: Path, level: Level):
    """Bytes that were read before they changed are read again, and the blob's mtime is not set over the write."""
    lock, source = two_variants()
    models = ensurer_of(tmp_path, lock, source)
    models.reconcile()
    file = models.local_path("m", "fp32") / "model.bin"
    written: list[int] = []

    def write_once(count: int) -> None:
        if not written and os.stat(file).st_size == len(BIG):
            written.append(count)
            file.chmod(0o644)
            with open(file, "r+b") as opened:
                opened.write(b"DAMAGE")

    store = BlobStore.open(tmp_path / "root")
    report = verifier.audit(store, models.desired(["m#fp32"]), level, on_bytes=write_once)

    assert written and [finding.digest for finding in report.faults if finding.kind == "corrupt"] == [Digest.of(BIG)]
    assert models.status("m", "fp32").state is ModelState.CORRUPT
    assert models.ensure("m", "fp32") and tree_of(models.local_path("m", "fp32")) == FP32


def test_what_the_plan_fetches_is_what_is_fetched(tmp_path: Path):
    """A missing blob, a damaged one and one that only trees hold: the plan and the run name the same."""
    lock, source = two_variants()
    models = ensurer_of(tmp_path, lock, source)
    models.reconcile()
    store, path = BlobStore.open(tmp_path / "root"), models.local_path("m", "fp32")
    big, half, config = Digest.of(BIG), Digest.of(HALF), Digest.of(CONFIG)
    (path / "model.bin").unlink()
    os.unlink(store.layout.blob(big))  # missing
    half_blob = Path(store.layout.blob(half))  # damaged
    half_blob.chmod(0o644)
    half_blob.write_bytes(b"x" + HALF[1:])
    os.unlink(store.layout.blob(config))  # missing, but its trees hold it

    plan = models.plan()
    planned = {action.digest for action in plan.actions if isinstance(action, Fetch)}
    started: set[Digest] = set()
    models.events.subscribe(lambda event: started.add(event.digest) if isinstance(event, FetchStarted) else None)
    models.reconcile()

    assert planned == started == {big, half} and plan.local == {config}


def test_blobs_of_a_run_that_broke_off_are_synced_by_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A kill between a blob's name and its sync leaves a name that a power cut could take; the next run vouches for it."""
    lock, source = two_variants()
    models = ensurer_of(tmp_path, lock, source)
    synced: list[int] = []
    monkeypatch.setattr(BlobStore, "sync_blobs", lambda self: synced.append(1))
    monkeypatch.setattr(Publisher, "publish", _refuse)
    with pytest.raises(FilesystemError, match="gone"):
        models.ensure("m")
    monkeypatch.undo()
    monkeypatch.setattr(BlobStore, "sync_blobs", lambda self: synced.append(1))
    assert synced == []

    models.ensure("m")
    assert synced == [1]
    models.ensure("m", force_redownload=True)
    assert synced == [1]


def _refuse(*args: object) -> bool:
    raise OSError("the disk is gone")
