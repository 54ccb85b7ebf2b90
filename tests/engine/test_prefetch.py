"""Files that no listing names by digest are fetched once, even if `lock` is stopped, killed or asked to list again."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Timer

import pytest
from builders import PATIENCE_S, Cli, manifest_of, some_bytes, wait_until
from origin import Fault, Origin, gate_of

from modelstow.cas import BlobStore, CancellationToken, Cancelled, Digest, locks
from modelstow.cas.layout import Layout
from modelstow.reconcile.runtime import registry_of
from modelstow.reconcile.settings import Settings
from modelstow.reconcile.transfer.context import TransferContext
from modelstow.reconcile.transfer.prefetch import Prefetcher
from modelstow.reconcile.transfer.source_health import BadSources, FailureTable

pytestmark = pytest.mark.slow

DATA = some_bytes(6 << 20, 1)
HALF = 3 << 20
PATH = "m/weights.bin"


@contextmanager
def served(cli: Cli, version: str = '"1"', data: bytes = DATA) -> Iterator[Origin]:
    """A server that lists the weights without a digest, and reports their version."""
    with Origin({PATH: data}) as origin:
        versioned(origin, version)
        (cli.folder / "models.toml").write_text(manifest_of(f"{origin.url}/m"))
        yield origin


def versioned(origin: Origin, version: str) -> None:
    origin.behave()
    origin.fail(PATH, Fault(headers={"ETag": version} if version else {}, times=-1))


def broken_off(cli: Cli, origin: Origin, how: signal.Signals = signal.SIGKILL) -> int:
    """Start `lock` and end it when half of the weights are there; its exit code."""
    gate = gate_of(origin, PATH, after=HALF)
    process = cli.start("lock", endless_reads=True)
    assert origin.reached.wait(PATIENCE_S)
    wait_until(lambda: any(spool.stat().st_size > HALF - (1 << 20) for spool in incoming(cli)))
    process.send_signal(how)
    process.communicate(timeout=PATIENCE_S)  # the gate is still shut and no read times out
    gate.set()
    del origin.gates[PATH]
    return process.returncode


def incoming(cli: Cli) -> list[Path]:
    return list(cli.root.glob("partial/incoming-*"))


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_what_a_lock_that_ended_early_had_fetched_is_not_fetched_again(cli: Cli, how: signal.Signals):
    """However it ended, the next run requests the rest, and the digest it locks is right."""
    with served(cli) as origin:
        assert broken_off(cli, origin, how) == {signal.SIGINT: 130, signal.SIGTERM: 143}.get(how, -how)
        origin.forget()
        cli.ok("lock")
        rest = [seen.range for seen in origin.gets(PATH) if seen.range]

    assert str(Digest.of(DATA)) in (cli.folder / "models.lock").read_text()
    assert len(rest) == 1 and int(rest[0].removeprefix("bytes=").rstrip("-")) > HALF - (1 << 20)
    assert incoming(cli) == []


@pytest.mark.parametrize("version", ['"2"', 'W/"1"', ""], ids=["another", "a weak one", "none"])
def test_what_changed_meanwhile_is_fetched_whole(cli: Cli, version: str):
    """What was fetched may belong to another version."""
    after = some_bytes(6 << 20, 2)
    with served(cli) as origin:
        broken_off(cli, origin)
        origin.objects[PATH] = after
        versioned(origin, version)
        cli.ok("lock")

    assert str(Digest.of(after)) in (cli.folder / "models.lock").read_text()


def test_what_changes_between_two_questions_is_fetched_whole(cli: Cli):
    """The first answer is of the version that was begun, the range is of another."""
    after = some_bytes(6 << 20, 2)
    with served(cli) as origin:
        broken_off(cli, origin)
        origin.behave()
        origin.fail(PATH, Fault(headers={"ETag": '"1"'}))
        origin.fail(PATH, Fault(headers={"ETag": '"2"'}, times=-1))
        origin.objects[PATH] = after
        cli.ok("lock")

    assert str(Digest.of(after)) in (cli.folder / "models.lock").read_text()


def test_listing_again_fetches_only_what_changed(cli: Cli):
    """`lock --upgrade` asks each file for its version, and reads nothing more of one that is the same."""
    with served(cli) as origin:
        cli.ok("lock")
        first = (cli.folder / "models.lock").read_text()
        origin.forget()
        cli.ok("lock", "--upgrade")
        assert origin.sent(PATH) < len(DATA) // 2 and (cli.folder / "models.lock").read_text() == first

        origin.objects[PATH] = after = some_bytes(6 << 20, 2)
        versioned(origin, '"2"')
        cli.ok("lock", "--upgrade")
        assert str(Digest.of(after)) in (cli.folder / "models.lock").read_text()


def test_what_was_named_and_swept_is_fetched_again(cli: Cli):
    """A name is worth nothing without its blob: a reconcile should find that in the store."""
    with served(cli):
        cli.ok("lock")
        next(cli.root.glob(f"blobs/sha256/*/{Digest.of(DATA).hex}")).unlink()
        cli.ok("lock", "--upgrade")

    assert next(cli.root.glob(f"blobs/sha256/*/{Digest.of(DATA).hex}")).read_bytes() == DATA


def test_a_local_file_that_did_not_change_is_read_once(cli: Cli):
    """Of a folder too, by the time of its last change, unless that was just now."""
    source = cli.folder / "src"
    source.mkdir()
    (source / "weights.bin").write_bytes(DATA)
    os.utime(source / "weights.bin", (1_000_000_000, 1_000_000_000))
    (cli.folder / "models.toml").write_text(manifest_of("src"))
    cli.ok("lock")

    reported = cli.ok("lock", "--upgrade", "--progress", "json").err
    assert "TaskBegan" not in reported

    (source / "weights.bin").write_bytes(DATA[::-1])
    cli.ok("lock", "--upgrade")
    assert str(Digest.of(DATA[::-1])) in (cli.folder / "models.lock").read_text()


# ---- by itself


def prefetcher_of(folder: Path, token: CancellationToken | None = None) -> Prefetcher:
    settings = Settings(root=folder / "root")
    context = TransferContext(
        registry=registry_of(settings),
        base=folder,
        failures=FailureTable(),
        bad_sources=BadSources(Layout(settings.root).state_dir("bad-sources")),
        emit=lambda event: None,
        token=CancellationToken(token),
    )
    return Prefetcher(store=lambda: BlobStore.open(settings.root), context=context)


def test_after_a_power_cut_the_fetch_starts_from_scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Pages may be lost of a file whose size is right, and no digest is known that could show it."""
    with Origin({PATH: DATA}) as origin:
        url = f"{origin.url}/{PATH}"
        origin.fail(PATH, Fault(headers={"ETag": '"1"'}, cut_after=HALF, reset=False))
        origin.fail(PATH, Fault(status=404, times=-1))
        with pytest.raises(Exception, match="404"):
            prefetcher_of(tmp_path).prefetch_all([url])
        (left,) = (tmp_path / "root/partial").iterdir()
        with left.open("r+b") as file:
            file.write(bytes(4096))  # as if it had never been written

        monkeypatch.setattr(locks, "boot_id", lambda: "another")
        versioned(origin, '"1"')
        assert prefetcher_of(tmp_path).prefetch_all([url]) == {url: (Digest.of(DATA), len(DATA))}


def test_two_that_name_the_same_do_not_write_into_one_file(tmp_path: Path):
    """The second does the work again, and both are right."""
    with Origin({PATH: DATA}) as origin:
        versioned(origin, '"1"')
        url = f"{origin.url}/{PATH}"
        gate = gate_of(origin, PATH, after=HALF)
        first = prefetcher_of(tmp_path)
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(first.prefetch_all, [url])
            assert origin.reached.wait(PATIENCE_S)
            del origin.gates[PATH]
            assert prefetcher_of(tmp_path).prefetch_all([url])[url] == (Digest.of(DATA), len(DATA))
            gate.set()
            assert waiting.result(PATIENCE_S)[url] == (Digest.of(DATA), len(DATA))
    assert list((tmp_path / "root/partial").iterdir()) == []


@pytest.mark.usefixtures("endless_reads")
def test_a_stop_ends_pulls_and_keeps_what_came(tmp_path: Path):
    """An embedding program sets an event and does not wait for the server."""
    token = CancellationToken()
    with Origin({PATH: DATA}) as origin:
        versioned(origin, '"1"')
        gate = gate_of(origin, PATH, after=HALF)

        def cancel() -> None:
            wait_until(lambda: any(path.stat().st_size for path in (tmp_path / "root/partial").glob("incoming-*")))
            token.cancel()

        Timer(0, cancel).start()
        with pytest.raises(Cancelled):
            prefetcher_of(tmp_path, token).prefetch_all([f"{origin.url}/{PATH}"])
        gate.set()
    assert [path.name[:9] for path in (tmp_path / "root/partial").iterdir()] == ["incoming-"]
