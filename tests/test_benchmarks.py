"""The benchmarks and `modelstow bench` run and report what they promise; nothing here is about speed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from builders import Cli

pytest.importorskip("benchmarks", reason="benchmarks are not part of the wheel")
from benchmarks import rate_capped_server, table
from benchmarks.output_dirs import places

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).parent.parent


def asked(out: Path, *argv: str) -> dict[str, list[dict[str, object]]]:
    """Run ``python -m benchmarks --quick`` and read what it wrote: rows by question."""
    command = [sys.executable, "-m", "benchmarks", "--quick", "--repeats", "1", "--out", str(out), *argv]
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))}
    done = subprocess.run(command, cwd=out.parent, env=environ, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    document = json.loads(out.read_text())
    assert document["machine"]["python"] and document["machine"]["kernel"]
    found: dict[str, list[dict[str, object]]] = {}
    for row in document["rows"]:
        found.setdefault(row["question"], []).append(row)
    return found


def test_verification_is_measured_at_every_level_next_to_reading(tmp_path: Path) -> None:
    """Every row has a positive figure, or says why it has none; the scratch folder is gone afterwards."""
    rows = asked(tmp_path / "results.json", "--only", "verification", "--size", "2MiB")["verification"]

    by_name = {str(row["row"]): row for row in rows}
    assert {"modelstow verify --quick", "modelstow verify", "modelstow verify --full", "cat"} <= by_name.keys()
    for name, row in by_name.items():
        if row["value"] is None:
            assert str(row["note"]).startswith("not available: "), name
        else:
            assert float(str(row["value"])) > 0 and float(str(row["ratio"])) > 0, name
    assert by_name["cat"]["ratio"] == 1.0
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


def test_a_no_op_makes_one_stat_a_file_and_opens_no_content(tmp_path: Path) -> None:
    """The claims about a no-op are counted, where strace is there to count."""
    rows = asked(tmp_path / "results.json", "--only", "noop", "--files", "30")["noop"]

    by_name = {str(row["row"]): row["value"] for row in rows}
    assert by_name["30 files: stats of blobs and files, each file"] in (1.0, None)
    assert by_name["30 files: contents opened"] in (0, None)
    assert by_name["1 file: heavy libraries that a no-op reconcile imports"] == 0


def test_locking_is_measured_next_to_git_and_reading_the_lockfile_next_to_json(tmp_path: Path) -> None:
    """Ours and its peer have figures, and the memory of `lock` is shown."""
    rows = asked(tmp_path / "results.json", "--only", "locking", "--files", "30")["locking"]

    by_name = {str(row["row"]).removeprefix("30 files: "): row for row in rows}
    assert by_name["modelstow lock"]["value"] and by_name["peak memory of lock"]["value"]
    assert by_name["5 times: reading the lockfile"]["ratio_to"] == "30 files: 5 times: json.loads of it"
    assert by_name["git add"]["value"] or "not installed" in str(by_name["git add"]["note"])


@pytest.mark.parametrize(
    ("question", "ours", "argv"),
    [
        ("download", {"modelstow reconcile": "sha256 of the cached file"}, ["--size", "2MiB"]),
        ("capped", {"modelstow reconcile --connections 1": "modelstow reconcile --connections 8"}, ["--size", "4MiB"]),
        ("small", {"modelstow reconcile": "modelstow reconcile"}, ["--files", "20"]),
    ],
)
def test_downloads_are_measured_next_to_peers(tmp_path: Path, question: str, ours: dict[str, str], argv: list[str]) -> None:
    """Ours has a figure and what it is compared with; a peer has one too, or says why not; nothing is left in memory."""
    rows = asked(tmp_path / "results.json", "--only", question, *argv)[question]

    by_name = {str(row["row"]): row for row in rows}
    for name, other in ours.items():
        assert by_name[name]["value"] and by_name[name]["ratio_to"] == other
    for name, row in by_name.items():
        if row["value"] is None:
            assert str(row["note"]).startswith("not available: "), name
        else:
            assert float(str(row["value"])) > 0 and float(str(row["ratio"])) > 0 and row["ratio_to"] in by_name, name
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


def test_what_killed_downloads_cost_is_counted_by_the_server(tmp_path: Path) -> None:
    """All of the file was sent at least once, and no more than the kills may cost."""
    rows = asked(tmp_path / "results.json", "--only", "kills", "--size", "2MiB", "--seed", "4")["kills"]

    by_name = {str(row["row"]): row for row in rows}
    ours = by_name["modelstow reconcile --connections 2"]
    assert 1.0 <= float(str(ours["value"])) <= float(str(by_name["the bound"]["value"])), ours["note"]
    assert "seed 4" in str(by_name["the bound"]["note"])


def test_a_capped_rate_has_no_burst() -> None:
    """Every byte is paid for before it goes, also after a rest and in a new request."""
    bucket = rate_capped_server.Bucket(1000)
    bucket.begin(0.0)
    waits = [bucket.take(100, 0.0), bucket.take(100, 0.1), bucket.take(100, 0.2)]
    bucket.begin(9.0)
    after_a_rest = bucket.take(100, 9.0)
    bucket.begin(9.05)

    assert waits == pytest.approx([0.1, 0.1, 0.1])
    assert after_a_rest == pytest.approx(0.1)
    assert bucket.take(100, 9.05) == pytest.approx(0.15), "another request of this connection waits for the one before"


def test_an_overslept_sender_catches_up_a_little() -> None:
    """A slow clock costs no rate, but a client that reads slowly saves nothing up."""
    bucket = rate_capped_server.Bucket(1000)
    bucket.begin(0.0)
    bucket.take(100, 0.0)

    assert bucket.take(100, 0.15) == pytest.approx(0.05)
    assert bucket.take(100, 5.0) == pytest.approx(0.0)
    assert bucket.take(100, 5.0) == pytest.approx(0.1)


def test_memory_without_room_is_no_place(tmp_path: Path) -> None:
    """The rows on tmpfs are left out with a reason rather than filling the machine's memory."""
    with places(tmp_path, 1 << 60, frees=False) as (where, reason):
        assert [place.folder for place in where] == [tmp_path]
        assert reason


def test_the_table_goes_between_the_marks_and_makes_the_end_mark() -> None:
    """Writing it twice gives the same text, and the text around it stays."""
    once = table.placed(f"before\n{table.BEGIN}\n\nafter\n", "| x |")
    twice = table.placed(once, "| y |")

    assert once == f"before\n{table.BEGIN}\n| x |\n{table.END}\n\nafter\n"
    assert twice == once.replace("| x |", "| y |")
    with pytest.raises(ValueError, match="benchmarks"):
        table.placed("no mark", "| x |")


def test_bench_reports_throughput_and_leaves_nothing(cli: Cli) -> None:
    """Every level that reads has a rate and a share of plain reading; the store is not even made."""
    document = cli.ok("bench", "--size", "16MiB", "--repeats", "1", "--json").json

    rows = {row["level"]: row for row in document["rows"]}
    assert list(rows) == ["read", "quick", "fast", "full"]
    assert all(row["seconds"] > 0 for row in rows.values())
    for level in ("read", "fast", "full"):
        assert rows[level]["bytes"] == 16 << 20
        assert rows[level]["bytes_per_second"] > 0 and rows[level]["share"] > 0
    assert (rows["quick"]["bytes"], rows["quick"]["bytes_per_second"], rows["quick"]["share"]) == (0, None, None)
    assert list(cli.folder.iterdir()) == []


def test_bench_refuses_a_size_that_does_not_fit_before_writing(cli: Cli) -> None:
    """Exit 6 with the figures, and nothing is left behind."""
    ran = cli.run("bench", "--size", "100000TB", "--json")

    assert ran.code == 6
    assert ran.json["error"]["code"] == "NO_SPACE"
    assert ran.json["error"]["details"]["bytes_needed"] == 2 * 100_000 * 10**12
    assert list(cli.folder.iterdir()) == []
