"""What `lock` takes of a source's listing, what it leaves out, and what it says of that."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from builders import CalledCli as Cli
from builders import some_bytes
from hub import Hub
from origin import Fault, Origin

pytestmark = pytest.mark.slow

EMPTY = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
SOME = "a" * 64


def write(cli: Cli, variant: str = "", source: str = "src") -> None:
    table = f'schema = 1\n[models.m]\nversion = "1"\nsources = ["{source}"]\n[models.m.variants.v]\n{variant}\n'
    (cli.folder / "models.toml").write_text(table)


def put(cli: Cli, **files: bytes | str | dict[str, object]) -> Path:
    folder = cli.folder / "src"
    folder.mkdir(exist_ok=True)
    for name, data in files.items():
        text = json.dumps({"weight_map": data}) if isinstance(data, dict) else data
        (folder / name.replace("__", ".")).write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder


def locked(cli: Cli) -> list[str]:
    return sorted(json.loads((cli.folder / "models.lock").read_text())["models"]["m@1"]["variants"]["v"]["files"])


# ---- what is not wanted stops nothing


@pytest.mark.parametrize("variant", ['include = ["c.bin"]', 'exclude = ["old.ckpt"]'])
def test_a_dangling_link_that_is_not_wanted_is_passed_over(cli: Cli, variant: str):
    """Whatever is wrong with it."""
    put(cli, c__bin="w")
    (cli.folder / "src/old.ckpt").symlink_to("/gone")
    write(cli, variant)

    assert cli.ok("lock", "--json").json["warnings"] == [] and locked(cli) == ["c.bin"]


def test_a_dangling_link_that_is_wanted_is_named_itself(cli: Cli):
    """Not the folder that it is in."""
    put(cli, c__bin="w")
    (cli.folder / "src/old.ckpt").symlink_to("/gone")
    write(cli)

    ran = cli.run("lock")
    assert ran.code == 5 and "src/old.ckpt" in ran.err and "exclude" in ran.err


def test_a_web_folder_without_an_index_is_passed_over_with_a_warning(cli: Cli):
    """What it holds is not known, and that is said; where the globs ask for all of it, it is an error that names it."""
    with Origin({"m/c.bin": b"w", "m/demo/": b"<title>Demo</title>", "m/demo/app.js": b"x"}) as origin:
        origin.fail("m/SHA256SUMS", Fault(status=404, times=-1))
        write(cli, 'include = ["c.bin"]', f"{origin.url}/m")
        (warning,) = cli.ok("lock", "--json").json["warnings"]
        assert (warning["code"], warning["path"]) == ("FOLDER_NOT_LISTED", "demo/") and locked(cli) == ["c.bin"]

        write(cli, 'exclude = ["demo/"]', f"{origin.url}/m")
        assert cli.ok("lock", "--json").json["warnings"] == []

        write(cli, "", f"{origin.url}/m")
        ran = cli.run("lock")
        assert ran.code == 5 and "/m/demo/" in ran.err


def test_sizes_are_requested_only_of_what_is_wanted(cli: Cli):
    """A file of SHA256SUMS that does not exist any more and is not wanted stops nothing."""
    with Origin({"m/c.bin": b"w", "m/gone.bin": b"x"}, listing="sums") as origin:
        origin.fail("m/gone.bin", Fault(status=404, times=-1))
        write(cli, 'include = ["c.bin"]', f"{origin.url}/m")
        cli.ok("lock")
        assert "m/gone.bin" not in {seen.path for seen in origin.requests}

        write(cli, "", f"{origin.url}/m")
        ran = cli.run("lock")
        assert ran.code == 5 and "gone.bin" in ran.err


def test_symlinked_folders_are_part_of_the_source(cli: Cli):
    """A text encoder that is linked from elsewhere is locked."""
    put(cli, model_index__json="{}")
    (cli.folder / "te").mkdir()
    (cli.folder / "te/model.safetensors").write_bytes(b"T")
    (cli.folder / "src/text_encoder").symlink_to("../te")
    write(cli, 'include = ["model_index.json", "text_encoder/**"]')

    cli.ok("lock")
    assert locked(cli) == ["model_index.json", "text_encoder/model.safetensors"]


# ---- names


@pytest.mark.parametrize("name", ["t00:00.json", "nul.txt", "end. ", "a?b", "a|b"])
def test_names_are_judged_after_rename(cli: Cli, name: str):
    """A file that the tree calls otherwise may have any name at its source, and the error says that this helps."""
    put(cli)
    (cli.folder / "src" / name).write_bytes(b"1")
    write(cli)
    ran = cli.run("lock")
    assert ran.code == 2 and "`rename`" in ran.err

    write(cli, f'rename = {{ "{name}" = "good.json" }}')
    cli.ok("lock")
    cli.ok("reconcile")
    assert locked(cli) == ["good.json"]
    assert (cli.folder / "root/models/m@1/v/good.json").read_bytes() == b"1"


def test_a_file_of_a_hub_whose_name_windows_forbids_can_be_renamed(cli: Cli):
    """The locator keeps the name at the source."""
    with Hub() as hub:
        hub.add("org/m", {"run/t00:00.json": b"1", "model.safetensors": b"w"})
        write(cli, 'rename = { "run/t00:00.json" = "run/t0000.json" }', "hf://org/m")
        cli.ok("lock", HF_ENDPOINT=hub.url)
        cli.ok("reconcile", HF_ENDPOINT=hub.url)

    assert locked(cli) == ["model.safetensors", "run/t0000.json"]


def test_names_that_differ_by_case_alone_say_that_rename_helps(cli: Cli):
    """On some file systems they are one file."""
    put(cli, README__md="a", readme__md="b")
    write(cli)
    ran = cli.run("lock")
    assert ran.code == 2 and "`rename`" in ran.err


# ---- the index


INDEX = 'index = "x.json"\n'


@pytest.mark.parametrize(
    "value", ["/scratch/model-2.bin", "../model-2.bin", "", "a//b", None, ["x"], 7, {"a": 1}, "C:\\m.bin"]
)
def test_what_an_index_cannot_mean_is_an_error_with_the_tensor(cli: Cli, value: object):
    """Dropped without a word, a shard would be missing."""
    put(cli, x__json={"good": "model-1.bin", "layer.7": value}, model_1__bin="1")
    (cli.folder / "src/model_1.bin").rename(cli.folder / "src/model-1.bin")
    write(cli, INDEX)

    ran = cli.run("lock")
    assert ran.code == 2 and "layer.7" in ran.err


def test_an_index_may_say_that_a_shard_is_here(cli: Cli):
    """``./x`` is ``x``; what it does not name is left out, which is said once, with count and bytes."""
    put(cli, x__json={"a": "./new.bin"}, new__bin="1", old_1__bin="22", old_2__bin="333")
    write(cli, INDEX)

    (warning,) = cli.ok("lock", "--json").json["warnings"]
    assert locked(cli) == ["new.bin", "x.json"]
    assert (warning["code"], warning["path"]) == ("LEFT_OUT_BY_INDEX", "x.json")
    assert "2 files" in warning["message"] and "5 bytes" in warning["message"] and "old_1.bin" in warning["message"]


def test_what_include_names_outright_stays_whatever_the_index_says(cli: Cli):
    """Weights next to the shards, such as a head or an adapter."""
    put(cli, x__json={"a": "model.bin"}, model__bin="1", mtp__bin="2", other__bin="3")
    write(cli, INDEX + 'include = ["*.json", "*.bin", "mtp.bin"]')

    cli.ok("lock")
    assert locked(cli) == ["model.bin", "mtp.bin", "x.json"]


def test_an_index_without_shards_is_refused(cli: Cli):
    """It would leave nothing out."""
    put(cli, x__json={}, model__bin="1")
    write(cli, INDEX)
    assert cli.run("lock").code == 2


# ---- what contradicts itself


@pytest.mark.parametrize(("digest", "content"), [(EMPTY, b"w"), (SOME, b"")])
def test_a_digest_and_a_size_that_contradict_each_other_are_refused(cli: Cli, digest: str, content: bytes):
    """At lock, not at reconcile."""
    with Origin({"m/c.bin": content, "m/SHA256SUMS": f"{digest}  c.bin\n".encode()}) as origin:
        write(cli, "", f"{origin.url}/m")
        ran = cli.run("lock")
    assert ran.code == 2 and "contradict" in ran.err


def test_the_command_of_the_hint_is_right_the_second_time_too(cli: Cli):
    """A list that has itself in it is passed over there."""
    with Origin({"m/c.bin": b"w", "m/SHA256SUMS": b""}) as origin:
        digest = "50e721e49c013f00c62cf59f2163542a9d8df02464efeb615d31051b0fddc326"
        origin.objects["m/SHA256SUMS"] = f"{digest}  ./c.bin\n{EMPTY}  ./SHA256SUMS\n".encode()
        write(cli, "", f"{origin.url}/m")
        cli.ok("lock")
        cli.ok("reconcile")
        assert locked(cli) == ["c.bin"]


# ---- files that change while they are read


@pytest.mark.parametrize("option", [[], ["--limit-rate", "1GB"]])
def test_a_file_that_changes_while_it_is_read_is_read_again(cli: Cli, option: list[str], monkeypatch: pytest.MonkeyPatch):
    """The digest is that of a state of the file, also behind a rate limit."""
    path = put(cli, c__bin=some_bytes(3 << 20, 1)) / "c.bin"
    write(cli)
    rest = [b"X", b"Y"]

    def meddle(fd: int) -> None:
        if rest:
            with open(path, "r+b") as file:
                file.write(rest.pop())

    _on_hash(monkeypatch, meddle)
    cli.ok("lock", *option)
    cli.ok("reconcile")
    assert (cli.folder / "root/models/m@1/v/c.bin").read_bytes() == path.read_bytes()


@pytest.mark.parametrize("size", [1000, 3 << 20])
def test_a_file_that_always_changes_is_refused_after_three_times(cli: Cli, size: int, monkeypatch: pytest.MonkeyPatch):
    """A digest that no state of it ever had is never written."""
    path = put(cli, c__bin=some_bytes(size, 1)) / "c.bin"
    write(cli)
    turns: list[int] = []

    def meddle(fd: int) -> None:
        turns.append(fd)
        with open(path, "ab") as file:
            file.write(b"more")

    _on_hash(monkeypatch, meddle)
    ran = cli.run("lock", "--json")
    assert ran.code == 5 and json.loads(ran.out)["error"]["code"] == "CONCURRENT_MODIFICATION"
    assert len(turns) == 3 and not (cli.folder / "models.lock").exists() and "c.bin" in ran.err + ran.out


def test_a_file_that_is_replaced_meanwhile_is_the_new_one(cli: Cli, monkeypatch: pytest.MonkeyPatch):
    """What has its name when `lock` ends is what was locked."""
    path = put(cli, c__bin=some_bytes(3 << 20, 1)) / "c.bin"
    write(cli)
    fresh = [b"other"]

    def meddle(fd: int) -> None:
        if fresh:
            os.replace(put(cli, new=fresh.pop()) / "new", path)

    _on_hash(monkeypatch, meddle)
    cli.ok("lock")
    cli.ok("reconcile")
    assert (cli.folder / "root/models/m@1/v/c.bin").read_bytes() == b"other"


def _on_hash(monkeypatch: pytest.MonkeyPatch, meddle: object) -> None:
    """Call *meddle* when the bytes of a file were read, and before it is known whether it changed."""
    from modelstow.reconcile.transfer import prefetch

    changed = prefetch._Watch.changed

    def meddled(watch: prefetch._Watch) -> bool:
        meddle(0)  # type: ignore[operator]
        return changed(watch)

    monkeypatch.setattr(prefetch._Watch, "changed", meddled)
