"""The house: who may import whom, who may print, and how large a thing may grow without saying why."""

from __future__ import annotations

import ast
import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent.parent
PACKAGES = ("cas", "backends", "reconcile")
MODULES = sorted(path for package in PACKAGES for path in (HERE / package).rglob("*.py"))

# Each third-party library has one room that may import it.
IMPORTERS = {
    "xxhash": ("cas",),
    "portalocker": ("cas",),
    "zstandard": ("cas",),
    "requests": ("backends",),
    "urllib3": ("backends",),
    "boto3": ("backends",),
    "botocore": ("backends",),
    "rich": ("reconcile/cli",),
    "tomlkit": ("reconcile/cli",),
    "pathspec": ("reconcile/desired",),
    "platformdirs": ("reconcile",),
}
# Within reconcile, arrows run one way.
LAYERS = {
    "desired": {"errors", "hints", "state_dirs", "desired"},
    "planning": {"errors", "hints", "state_dirs", "desired", "planning"},
    "events": {"errors", "hints", "state_dirs", "events"},
    "retention": {"errors", "hints", "state_dirs", "desired", "planning", "retention", "events"},
    "transfer": {"errors", "hints", "state_dirs", "desired", "events", "transfer"},
    "checkout": {"errors", "hints", "state_dirs", "desired", "planning", "events", "checkout"},
    "interop": {"errors", "hints", "state_dirs", "desired", "events", "transfer", "interop"},
}


def imports(path: Path) -> Iterator[str]:
    """Every imported module as an absolute dotted name."""
    package = path.relative_to(HERE).parent.parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(filter(None, (base, (node.module or "").removeprefix("modelstow."))))
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def named(path: Path) -> str:
    return str(path.relative_to(HERE))


@pytest.mark.parametrize("path", MODULES, ids=named)
def test_rooms_do_not_know_what_they_need_not(path: Path):
    """cas and backends know neither each other nor reconcile."""
    room = path.relative_to(HERE).parts[0]
    forbidden = {"cas": ("backends", "reconcile"), "backends": ("cas", "reconcile"), "reconcile": ()}[room]

    assert not [name for name in imports(path) if name.split(".")[0] in forbidden]


@pytest.mark.parametrize("path", MODULES, ids=named)
def test_each_library_has_one_importer(path: Path):
    """A library that is used everywhere can be replaced nowhere."""
    for name in imports(path):
        rooms = IMPORTERS.get(name.split(".")[0])
        assert rooms is None or named(path).startswith(rooms), f"{named(path)} imports {name}"


@pytest.mark.parametrize("path", MODULES, ids=named)
def test_layers_of_reconcile_run_one_way(path: Path):
    """desired and planning know nothing of doing; nobody but the face and the CLI knows the CLI."""
    parts = path.relative_to(HERE).parts
    if parts[0] != "reconcile" or len(parts) < 3 or parts[1] == "cli":
        return
    for name in imports(path):
        layer = name.split(".")[1] if name.startswith("reconcile.") else ""
        assert not layer or layer in LAYERS[parts[1]], f"{named(path)} imports {name}"


@pytest.mark.parametrize("path", MODULES, ids=named)
def test_only_the_command_line_prints_and_exits(path: Path):
    """Everything else returns values, raises errors or emits events."""
    if "cli" in path.parts:
        return
    calls = [node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]

    assert not [f for f in calls if isinstance(f, ast.Name) and f.id in ("print", "exit", "quit")]
    assert not [f for f in calls if isinstance(f, ast.Attribute) and ast.unparse(f) in ("sys.exit", "os._exit")]


@pytest.mark.parametrize("path", MODULES, ids=named)
def test_what_is_long_says_why(path: Path):
    """A function over 80 lines or a file over 400 carries a comment `# long: why`."""
    text = path.read_text()
    if text.count("\n") > 400:
        assert "# long: " in text, f"{named(path)} has {text.count(chr(10))} lines"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            lines = text.splitlines()[node.lineno - 1 : node.end_lineno]
            assert len(lines) <= 80 or any("# long: " in line for line in lines), f"{named(path)}: {node.name}"


@pytest.mark.parametrize("path", MODULES, ids=named)
def test_every_module_and_public_class_says_what_it_is(path: Path):
    """A reader must not need the body."""
    tree = ast.parse(path.read_text())

    assert ast.get_docstring(tree), named(path)
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{named(path)}: {node.name}"


def test_a_command_without_work_loads_neither_sources_nor_bars_nor_locks(tmp_path: Path):
    """Start-up is part of performance: what is not needed is not imported."""
    heavy = "requests boto3 rich portalocker pathspec tomlkit zstandard modelstow.reconcile.runtime"
    (tmp_path / "src.txt").write_text("x")
    row = f'files = [{{path = "src.txt", size = 1, sha256 = "{hashlib.sha256(b"x").hexdigest()}"}}]'
    table = 'schema = 1\n[models.m]\nversion = "1"\nsources = ["."]\n[models.m.variants.v]\n'
    (tmp_path / "models.toml").write_text(f"{table}{row}\n")
    environ = {**os.environ, "MODELSTOW_ROOT": str(tmp_path / "root"), "PYTHONPATH": str(HERE)}
    for command in ("lock", "reconcile"):
        subprocess.run(
            [sys.executable, "-m", "modelstow", command], cwd=tmp_path, env=environ, check=True, capture_output=True
        )
    code = (
        "import os, sys\n"
        "from modelstow.reconcile.cli.main import main\n"
        "sys.stdout = open(os.devnull, 'w')\n"
        "code = main(['reconcile'])\n"
        f"sys.stderr.write(repr((code, [name for name in {heavy.split()} if name in sys.modules])))\n"
    )

    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=tmp_path, env=environ
    )

    assert done.stderr.strip() == "(0, [])", done.stderr


def test_the_version_is_told_without_the_machinery():
    """Neither classes are made nor settings read for it."""
    heavy = "dataclasses inspect modelstow.cas modelstow.backends modelstow.reconcile.settings"
    code = (
        "import os, sys\n"
        "from modelstow.reconcile.cli.main import main\n"
        "sys.stdout = open(os.devnull, 'w')\n"
        "code = main(['--version'])\n"
        f"sys.stderr.write(repr((code, [name for name in {heavy.split()} if name in sys.modules])))\n"
    )

    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(HERE)},
    )

    assert done.stderr.strip() == "(0, [])", done.stderr
