"""The architecture: which module may import which, which may print, and how long a module or function may be."""

from __future__ import annotations

import ast
import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent
PACKAGES = ("cas", "backends", "reconcile")
MODULES = sorted(path for package in PACKAGES for path in (HERE / package).rglob("*.py"))

# Each third-party library has one room that may import it.
IMPORTERS = {
    "xxhash": ("cas", "reconcile/snapshot"),
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
    "desired": {"errors", "hints", "paths", "state_dirs", "desired"},
    "planning": {"errors", "hints", "paths", "state_dirs", "desired", "planning"},
    "events": {"errors", "hints", "paths", "state_dirs", "events"},
    "retention": {"errors", "hints", "paths", "state_dirs", "desired", "planning", "retention", "events"},
    "transfer": {"errors", "hints", "paths", "state_dirs", "desired", "events", "transfer"},
    "checkout": {"errors", "hints", "paths", "state_dirs", "desired", "planning", "events", "checkout"},
    "inspect": {"errors", "hints", "paths", "state_dirs", "desired", "planning", "retention", "inspect"},
    "interop": {"errors", "hints", "paths", "state_dirs", "desired", "events", "transfer", "interop"},
}


@cache
def syntax_tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def imports(path: Path) -> Iterator[str]:
    """Every imported module as an absolute dotted name."""
    package = path.relative_to(HERE).parent.parts
    for node in ast.walk(syntax_tree(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(filter(None, (base, (node.module or "").removeprefix("modelstow."))))
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def relative(path: Path) -> str:
    return str(path.relative_to(HERE))


def test_the_modules_of_all_three_packages_are_checked():
    """The checks below run over every module, so an empty list would pass them all."""
    assert {relative(path).partition("/")[0] for path in MODULES} == set(PACKAGES) and len(MODULES) > 90


def test_cas_and_backends_import_neither_each_other_nor_reconcile():
    """The lower packages know nothing of each other or of what is built on them."""
    forbidden = {"cas": ("backends", "reconcile"), "backends": ("cas", "reconcile"), "reconcile": ()}

    wrong = [
        f"{relative(path)} imports {name}"
        for path in MODULES
        for name in imports(path)
        if name.split(".")[0] in forbidden[relative(path).partition("/")[0]]
    ]

    assert not wrong, "\n".join(wrong)


def test_each_library_has_one_importer():
    """A library that is used everywhere can be replaced nowhere."""
    wrong = [
        f"{relative(path)} imports {name}"
        for path in MODULES
        for name in imports(path)
        if not relative(path).startswith(IMPORTERS.get(name.split(".")[0], ("",)))
    ]

    assert not wrong, "\n".join(wrong)


def test_layers_of_reconcile_run_one_way():
    """desired and planning know nothing of execution; only the facade and the CLI know the CLI."""
    inner = [(path, path.relative_to(HERE).parts) for path in MODULES]

    wrong = [
        f"{relative(path)} imports {name}"
        for path, parts in inner
        if parts[0] == "reconcile" and len(parts) > 2 and parts[1] != "cli"
        for name in imports(path)
        if name.startswith("reconcile.") and name.split(".")[1] not in LAYERS[parts[1]]
    ]

    assert not wrong, "\n".join(wrong)


def test_only_the_command_line_prints_and_exits():
    """Every other module returns values, raises errors or emits events."""
    calls = [
        (path, ast.unparse(node.func), node.lineno)
        for path in MODULES
        if "cli" not in path.parts
        for node in ast.walk(syntax_tree(path))
        if isinstance(node, ast.Call)
    ]

    wrong = [
        f"{relative(path)}:{line} calls {name}"
        for path, name, line in calls
        if name in ("print", "exit", "quit", "sys.exit", "os._exit")
    ]

    assert not wrong, "\n".join(wrong)


def test_long_files_and_functions_give_a_reason():
    """A function over 80 lines or a file over 400 carries a comment `# long: why`."""
    wrong = []
    for path in MODULES:
        lines = path.read_text().splitlines()
        if len(lines) > 400 and not any("# long: " in line for line in lines):
            wrong.append(f"{relative(path)} has {len(lines)} lines")
        for node in ast.walk(syntax_tree(path)):
            if isinstance(node, ast.FunctionDef):
                body = lines[node.lineno - 1 : node.end_lineno]
                if len(body) > 80 and not any("# long: " in line for line in body):
                    wrong.append(f"{relative(path)}: {node.name} has {len(body)} lines")

    assert not wrong, "\n".join(wrong)


def test_every_module_and_public_class_has_a_docstring():
    """A reader must not need the body."""
    wrong = []
    for path in MODULES:
        tree = syntax_tree(path)
        if not ast.get_docstring(tree):
            wrong.append(relative(path))
        public = [node for node in tree.body if isinstance(node, ast.ClassDef) and not node.name.startswith("_")]
        wrong += [f"{relative(path)}: {node.name}" for node in public if not ast.get_docstring(node)]

    assert not wrong, "\n".join(wrong)


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


def test_the_version_is_printed_without_importing_the_application():
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


# What a command with nothing to do may load of this package and of others, beyond what Python itself starts with.
QUICK = {
    "modelstow",
    "modelstow.reconcile",
    "modelstow.reconcile.cli",
    "modelstow.reconcile.cli.console",
    "modelstow.reconcile.cli.output",
    "modelstow.reconcile.cli.shortcut",
    "modelstow.reconcile.documents",
    "modelstow.reconcile.paths",
    "modelstow.reconcile.project",
    "modelstow.reconcile.snapshot",
    "xxhash",
    "xxhash._xxhash",
    "xxhash.version",
}
QUICK_STDLIB = {"__future__", "array", "collections", "itertools", "json", "keyword", "operator", "reprlib", "gc"}


def test_a_command_with_nothing_to_do_loads_these_modules_alone():
    """Each module more is time that every short command takes."""
    code = (
        "import sys; before = set(sys.modules)\n"
        "import modelstow.reconcile.cli.console, modelstow.reconcile.cli.shortcut, modelstow.reconcile.cli.output\n"
        "print(*sorted(set(sys.modules) - before))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())

    assert {name for name in loaded if name.startswith(("modelstow", "xxhash"))} == QUICK
    others = {name.partition(".")[0].lstrip("_") for name in loaded - QUICK} - {""}
    assert others - {name.lstrip("_") for name in QUICK_STDLIB} == set()
