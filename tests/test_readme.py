"""The documentation is true: what it shows runs and prints the same, and every command, option, code and key exists."""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from builders import Cli, lock_of, tree_of, write_lock
from hub import Hub

from modelstow import __version__
from modelstow.backends.registry import FACTORIES
from modelstow.reconcile.cli import parser
from modelstow.reconcile.desired import manifest as manifests
from modelstow.reconcile.errors import EXIT_CODES, InvalidConfigError

REPOSITORY = Path(__file__).resolve().parent.parent
README = REPOSITORY / "README.md"
DOCS = REPOSITORY / "docs"
REFERENCE = DOCS / "reference"
PAGES = [README, *(REPOSITORY / name for name in ("CONTRIBUTING.md", "SECURITY.md")), *sorted(DOCS.rglob("*.md"))]
SHOWN_FOLDER = "/home/you/try"
_MARK = "\x1e"


@dataclass(frozen=True)
class Block:
    """A fenced block of a page: its language, the heading above it, its text."""

    language: str
    heading: str
    text: str


@dataclass(frozen=True)
class Shown:
    """A command of a console block and the output that is shown for it."""

    command: str
    output: str


def blocks(page: Path, language: str) -> list[Block]:
    """The blocks of one language."""
    return [block for block in _blocks(page.read_text("utf-8")) if block.language == language]


def _blocks(text: str) -> Iterator[Block]:
    heading, language = "", None
    lines: list[str] = []
    for line in text.splitlines():
        if line.startswith("```"):
            if language is None:
                language, lines = line[3:].strip(), []
            else:
                yield Block(language, heading, "\n".join(lines))
                language = None
        elif language is not None:
            lines.append(line)
        elif line.startswith("#"):
            heading = line.lstrip("# ")


def commands(text: str) -> Iterator[Shown]:
    """Lines after ``$ `` are commands, with the rest of a here-document; the others are what they print."""
    lines = text.splitlines()
    while lines:
        command, output = lines.pop(0).removeprefix("$ "), []
        if "<<'EOF'" in command:
            end = lines.index("EOF") + 1
            command, lines = "\n".join([command, *lines[:end]]), lines[end:]
        while lines and not lines[0].startswith("$ "):
            output.append(lines.pop(0))
        yield Shown(command, "\n".join(output))


def console(page: Path) -> list[Shown]:
    """Every command that a page shows, in order."""
    return [shown for block in blocks(page, "console") for shown in commands(block.text)]


@dataclass
class Played:
    """Commands after they were run: what each printed, how the last ended, and the folder they left."""

    cli: Cli
    outputs: list[str]
    code: int


def play(cli: Cli, shown: Iterable[Shown], **more: str) -> Played:
    """Run commands in one shell, as a reader would who pastes them; *more* is in its environment."""
    shims = cli.folder.parent / "shims"
    shims.mkdir(exist_ok=True)
    shim = shims / "modelstow"
    shim.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m modelstow "$@"\n')
    shim.chmod(0o755)
    environ = cli.environ(PATH=f"{shims}{os.pathsep}{os.environ['PATH']}", LC_ALL="C")
    del environ["MODELSTOW_ROOT"]
    environ |= more
    script = "set -e\nexec 2>&1\n" + "".join(f"printf '{_MARK}'\n{each.command}\n" for each in shown)
    done = subprocess.run(["bash", "-c", script], cwd=cli.folder, env=environ, capture_output=True, text=True, timeout=60)
    return Played(cli, done.stdout.split(_MARK)[1:], done.returncode)


def empty(folder: Path) -> Cli:
    """A command line in a new folder below."""
    cli = Cli(folder / "try")
    cli.folder.mkdir()
    return cli


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> Played:
    """The quick start, run."""
    return play(empty(tmp_path_factory.mktemp("quickstart")), console(DOCS / "quickstart.md"))


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Played:
    """The README's session, run."""
    return play(empty(tmp_path_factory.mktemp("readme")), console(README))


def settled(text: str, folder: Path | str = SHOWN_FOLDER) -> str:
    """A command's output without what differs from run to run: the folder, times, speeds, free space."""
    text = text.replace(os.path.realpath(folder), SHOWN_FOLDER).replace(str(folder), SHOWN_FOLDER)
    text = re.sub(r"\b\d+(\.\d+)? s\b", "_ s", text)
    text = re.sub(r"\d+(\.\d+)? [kMGT]?B/s", "_ B/s", text)
    text = re.sub(r"\d+(\.\d+)? [kMGT]?B free", "_ B free", text)
    return "\n".join(line.rstrip() for line in text.strip().splitlines())


def test_the_quick_start_prints_what_is_shown(played: Played) -> None:
    """Word for word in an empty folder; only times, speeds and free space may differ."""
    assert len(played.outputs) > 10, "the quick start was not found"
    compare(played, console(DOCS / "quickstart.md"))


def test_the_session_of_the_readme_prints_what_is_shown(session: Played) -> None:
    assert len(session.outputs) > 6, "the session was not found"
    compare(session, console(README))


def compare(ran: Played, shown: list[Shown]) -> None:
    assert ran.code == 0, f"`{shown[len(ran.outputs) - 1].command}` failed:\n{ran.outputs[-1]}"
    for expected, output in zip(shown, ran.outputs, strict=True):
        assert settled(output, ran.cli.folder) == settled(expected.output), f"of `{expected.command}`"


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=lambda page: page.stem)
def test_the_python_that_is_shown_runs(
    page: Path, played: Played, session: Played, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the folder that the quick start left; for the README, that of its session."""
    monkeypatch.chdir((session if page == README else played).cli.folder)
    monkeypatch.delenv("MODELSTOW_LOCK", raising=False)
    names: dict[str, Any] = {}
    for block in blocks(page, "python"):
        exec(compile(block.text, page.name, "exec"), names)
    if page == DOCS / "format.md":
        assert names["tables"] > 0
    else:
        assert (names["path"] / "model.safetensors").is_file()
        assert names.get("state", "COMPLETE") == "COMPLETE"


def test_every_manifest_that_is_shown_can_be_read() -> None:
    found = [block.text for page in PAGES for block in blocks(page, "toml")]
    assert len(found) > 5
    for text in found:
        whole = text if text.lstrip().startswith("schema") else f"schema = 1\n{text}"
        assert manifests.parse(whole.encode(), Path("models.toml")).models


# ---- guides

GUIDES = DOCS / "guides"
PROJECT = """schema = 1
[models."minilm"]
version = "1.0.0"
sources = ["src"]
default = "fp32"
[models."minilm".variants.fp32]
include = ["*.json", "model.safetensors"]
[models."minilm".variants.fp16]
include = ["*.json", "model.fp16.safetensors"]
"""


def follow(cli: Cli, page: Path, places: dict[str, str] | None = None, **environ: str) -> None:
    """Run every command of a page, with other places for some that it names; each must succeed."""
    text = "\n".join(block.text for block in blocks(page, "console"))
    for shown, place in (places or {}).items():
        assert shown in text, f"{page.name} does not say {shown}"
        text = text.replace(shown, place)
    ran = play(cli, commands(text), **environ)
    assert ran.code == 0, f"{page.name}: {ran.outputs[-1]}"


def project(tmp_path: Path) -> Cli:
    """A folder with a manifest and the model's files, locked and reconciled."""
    cli = empty(tmp_path)
    (cli.folder / "src").mkdir()
    for name in ("config.json", "model.safetensors", "model.fp16.safetensors"):
        (cli.folder / "src" / name).write_bytes(name.encode())
    (cli.folder / "models.toml").write_text(PROJECT)
    cli.ok("lock")
    cli.ok("reconcile")
    return cli


# What guides name that a test has elsewhere: by page, the words of the page and the path in the project.
PLACES = {
    "continuous-integration": {},
    "damage": {"some/tree": "root/models/minilm@1.0.0/fp32"},
    "disk-space": {},
    "service": {"/app/model": "app"},
    "shared-store": {"/srv/models": "shared", "/old/project/models.lock": "models.lock"},
}


@pytest.mark.parametrize("guide", PLACES)
def test_the_commands_of_a_guide_work(tmp_path: Path, guide: str) -> None:
    """One after the other, in a project that was reconciled."""
    cli = project(tmp_path)
    places = {shown: str(cli.folder / place) for shown, place in PLACES[guide].items()}
    follow(cli, GUIDES / f"{guide}.md", places, MODELSTOW_ROOT=str(cli.root))


def test_every_page_with_commands_is_run() -> None:
    tested = {README, DOCS / "quickstart.md", *(GUIDES / f"{name}.md" for name in (*PLACES, "hub", "mirror", "manifests"))}
    assert {page for page in PAGES if blocks(page, "console")} == tested


def test_the_guide_to_optional_parts_works(tmp_path: Path) -> None:
    """Its manifest, from a folder in place of the server."""
    cli = empty(tmp_path)
    for path in ("model_index.json", "unet/w.bin", "vae/w.bin", "text_encoder/w.bin", "lora/a.safetensors"):
        for model in ("painter", "painter-anime"):
            (cli.folder / model / path).parent.mkdir(parents=True, exist_ok=True)
            (cli.folder / model / path).write_bytes(path.encode())
    _, overlay = blocks(GUIDES / "manifests.md", "toml")
    (cli.folder / "models.toml").write_text("schema = 1\n" + overlay.text.replace("https://models.example.org/", ""))
    cli.ok("lock")
    follow(cli, GUIDES / "manifests.md", MODELSTOW_ROOT=str(cli.root))
    assert sorted(tree_of(cli.root / "models/painter@1.0.0/fp16")) == [
        "model_index.json",
        "text_encoder/w.bin",
        "unet/w.bin",
    ]


def test_the_guide_to_a_hub_works(tmp_path: Path) -> None:
    """Its manifest, locked without a byte of the weights; a later commit comes with the last command."""
    cli, root, page = empty(tmp_path), tmp_path / "store", GUIDES / "hub.md"
    [manifest] = blocks(page, "toml")
    take, upgrade = (list(commands(block.text)) for block in blocks(page, "console"))
    (cli.folder / "models.toml").write_text(f"schema = 1\n{manifest.text}\n")
    old = {"config.json": b"{}", "vocab.txt": b"a", "1_Pooling/config.json": b"{ }", "model.safetensors": b"old weights"}
    with Hub() as hub:
        environ = {"MODELSTOW_ROOT": str(root), "HF_ENDPOINT": hub.url}

        def run(shown: list[Shown]) -> None:
            ran = play(cli, shown, **environ)
            assert ran.code == 0, ran.outputs[-1]

        repository = hub.add("sentence-transformers/all-MiniLM-L6-v2", {**old, "pytorch_model.bin": b"not wanted"})
        cli.ok("lock", **environ)
        assert hub.cdn.requests == []
        run(take)
        assert tree_of(root / "models/minilm@1.0.0/default") == old

        new = {**old, "model.safetensors": b"new weights"}
        repository.commit(new)
        run(take)
        assert tree_of(root / "models/minilm@1.0.0/default") == old
        run([*upgrade, *take])
        assert tree_of(root / "models/minilm@1.0.0/default") == new


def test_the_guide_to_a_mirror_works(tmp_path: Path) -> None:
    """Filled from one store, it is all that another machine needs; the first store's blobs would do as well."""
    cli, mirror, filled, other = empty(tmp_path), *(tmp_path / name for name in ("mirror", "filled", "other"))
    fill, read = (b.text.replace("/mnt/mirror", str(mirror)) for b in blocks(GUIDES / "mirror.md", "console"))
    config = {"config.json": b"{}"}
    variants = {"fp16": {**config, "model.fp16.bin": b"half"}, "fp32": {**config, "model.bin": b"whole"}}
    write_lock(cli.folder, lock_of({"minilm@1.0.0": variants}, sources=["src"]))
    source = cli.folder / "src"
    source.mkdir()
    for path, data in (variants["fp16"] | variants["fp32"]).items():
        (source / path).write_bytes(data)

    def run(text: str, root: Path) -> None:
        ran = play(cli, commands(text), MODELSTOW_ROOT=str(root))
        assert ran.code == 0, ran.outputs[-1]

    run(fill, filled)
    shutil.rmtree(source)
    run(read, other)
    assert {name: tree_of(other / "models/minilm@1.0.0" / name) for name in variants} == variants

    shutil.rmtree(mirror)
    shutil.rmtree(other)
    run(read.replace(str(mirror), str(filled / "blobs")), other)
    assert {name: tree_of(other / "models/minilm@1.0.0" / name) for name in variants} == variants


# ---- commands and options


def command_lines() -> list[str]:
    """Every command line of modelstow in the documentation: in console blocks, and inline in backticks."""
    found = []
    for page in PAGES:
        typed = "\n".join(shown.command for shown in console(page))
        found += re.findall(r"(?<![\w./-])modelstow +([^|;&)\n\"]+)", typed)
        prose = re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
        found += re.findall(r"`modelstow +([^`]+)`", prose)
    return [line for line in dict.fromkeys(found) if "COMMAND" not in line and line != "--version"]


def subcommands() -> dict[str, argparse.ArgumentParser]:
    grammar = parser.build_parser(__version__)
    action = next(a for a in grammar._actions if isinstance(a, argparse._SubParsersAction))
    return dict(action.choices)


def test_every_command_line_that_is_shown_parses() -> None:
    lines = command_lines()
    assert len(lines) > 30
    wrong = []
    for line in lines:
        words = shlex.split(re.sub(r"\s([0-9]?>|#).*", "", line))  # a # within a word begins no comment
        try:
            parser.build_parser(__version__).parse_args(words)
        except InvalidConfigError as error:
            wrong.append(f"{line}: {error}")
    assert not wrong


def table_of(page: Path) -> list[list[str]]:
    """The rows of the first table of a page, without the two head lines."""
    rows: list[list[str]] = []
    for line in page.read_text("utf-8").splitlines():
        if line.startswith("|"):
            rows.append([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
        elif rows:
            break
    return rows[2:]


def test_the_reference_lists_every_command_and_no_other() -> None:
    named = [re.findall(r"`([a-z]+)", row[0]) for row in table_of(REFERENCE / "cli.md")]
    assert sorted(name for names in named for name in names) == sorted(subcommands())


def test_every_option_is_documented_and_every_documented_option_exists() -> None:
    real = {o for p in subcommands().values() for a in p._actions for o in a.option_strings if o.startswith("--")}
    real |= {"--version"}
    assert options_in(REFERENCE / "cli.md") == real
    for page in [README, *DOCS.rglob("*.md")]:
        assert options_in(page) <= real, page


def options_in(page: Path) -> set[str]:
    """Every long option that a page names, but those of other programs in blocks of shell."""
    prose = re.sub(r"^```sh$.*?^```$", "", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    return set(re.findall(r"(?<![\w-])--[a-z][a-z-]*[a-z]", prose))


# ---- variables

# Their names are put together from the scheme of an address.
PROXIES = {"HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"}


def test_the_reference_lists_every_variable_that_is_read_and_no_other() -> None:
    """But HOME, and those of AWS, which boto3 reads."""
    modules = [path for package in ("cas", "backends", "reconcile") for path in (REPOSITORY / package).rglob("*.py")]
    code = "\n".join(path.read_text("utf-8") for path in modules)
    read = re.findall(r"""(?:environ(?:\.get\(|\[)|env_flag\([\w.]+, )"([A-Z_]+)\"""", code)
    documented = re.findall(r"`([A-Z_]+\*?)`", " ".join(row[0] for row in table_of(REFERENCE / "environment.md")))
    assert len(documented) == len(set(documented)) and "AWS_*" in documented
    assert not_of_aws(documented) - PROXIES == not_of_aws(read) - {"HOME"}
    assert set(documented) >= PROXIES


def not_of_aws(names: Iterable[str]) -> set[str]:
    return {name for name in names if not name.startswith("AWS_")}


# ---- codes and keys


def test_the_reference_lists_every_kind_of_source_and_no_other() -> None:
    documented = set(re.findall(r"`([a-z0-9]+)://", " ".join(row[0] for row in table_of(REFERENCE / "sources.md"))))
    assert documented == set(FACTORIES) - {""}


def test_the_reference_gives_every_error_code_its_exit_code() -> None:
    rows = table_of(REFERENCE / "exit-codes.md")
    documented = {code: int(row[0]) for row in rows for code in re.findall(r"`([A-Z_]+)`", row[2])}
    assert {code: exit_ for code, exit_ in documented.items() if exit_ != 1} == EXIT_CODES


# What each command is given in the folder of the quick start, and what the words in capitals stand for.
ARGUMENTS = {
    "ensure": ["--all"],
    "which": ["models.toml"],
    "diff": ["models.lock", "models.lock"],
    "push": ["tiny#fp16", "mirror"],
    "bench": ["--size", "1MB", "--repeats", "1"],
    "pin": ["tiny#fp16"],
    "unpin": ["tiny#fp16"],
    "evict": ["tiny#fp16"],
    "release": ["elsewhere"],
    "init": ["--manifest", "new.toml"],
    "add": ["weights", "--name", "other", "--manifest", "new.toml"],
    "remove": ["other", "--manifest", "new.toml"],
}
STANDS_FOR = {"SEL": "tiny#fp16", "ROOT": "models.lock"}


def json_shapes() -> dict[str, str]:
    """What is shown of the JSON of each command, in the order of the page: ``gc --roots`` -> ``{roots: [...]}``."""
    [block] = blocks(REFERENCE / "json.md", "text")
    rows = re.findall(r"^(\S.*?)\n((?:  .*\n?)+)", block.text, flags=re.MULTILINE)
    return {name: shape for names, shape in rows for name in names.split(", ")}


def keys_of(document: Any) -> set[str]:
    if isinstance(document, dict):
        return set(document).union(*(keys_of(value) for value in document.values()))
    return set().union(*(keys_of(value) for value in document)) if isinstance(document, list) else set()


def test_the_json_documents_have_the_keys_that_are_told(played: Played) -> None:
    """Of every command. Both ways at the top: what it answers is documented, and what is documented it answers."""
    shapes = json_shapes()
    assert {name.split()[0] for name in shapes} == set(subcommands())
    for name, shape in shapes.items():
        command, *more = [STANDS_FOR.get(word, word) for word in name.split()]
        if command == "release":
            store = str(played.cli.folder / "store")
            played.cli.ok("ensure", "tiny#fp16", "--into", "elsewhere", MODELSTOW_ROOT=store)
        ran = played.cli.run(
            command, *more, *ARGUMENTS.get(command, []), "--json", MODELSTOW_ROOT=str(played.cli.folder / "store")
        )
        assert ran.out.count("\n") == 1 and (ran.code == 0 or command == "doctor"), (name, ran)
        document = ran.json
        assert document["schema"] == 1 and document["ok"] is (ran.code == 0), (name, ran)
        documented = set(re.findall(r"[a-z_]+", shape)) | {"schema", "ok"}
        if command == "doctor" and ran.code:  # this machine may lack something
            del document["error"]
        assert keys_of(document) <= documented, name
        assert top_keys(shape) <= document.keys(), name


def top_keys(shape: str) -> set[str]:
    """The keys at the top of ``{a: int, b, c: [{d}]}``, without those that end in a question mark."""
    text = shape.strip()[1:-1]
    while (flat := re.sub(r"\{[^{}]*\}|\[[^\[\]]*\]", "", text)) != text:
        text = flat
    keys = [part.partition(":")[0].strip() for part in text.split(",")]
    return {key for key in keys if not key.endswith("?")}


def test_the_lockfile_is_as_shown(played: Played) -> None:
    [block] = blocks(REFERENCE / "lockfile.md", "json")
    shown, real = json.loads(block.text), json.loads((played.cli.folder / "models.lock").read_text())
    assert list(shown) == list(real)
    model, locked = next(iter(shown["models"].values())), next(iter(real["models"].values()))
    assert list(model) == list(locked) and list(model["variants"]["fp16"]) == list(locked["variants"]["fp16"])
    assert {tuple(blob) for blob in shown["blobs"].values()} == {tuple(blob) for blob in real["blobs"].values()}


def test_the_format_file_of_a_store_is_as_shown(played: Played) -> None:
    [block] = blocks(DOCS / "format.md", "json")
    shown, real = json.loads(block.text), json.loads((played.cli.folder / "store/modelstow.json").read_text())
    assert {**shown, "epoch": real["epoch"]} == real and list(shown) == list(real)
