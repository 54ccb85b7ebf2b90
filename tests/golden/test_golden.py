"""The exact output of the commands: one story, its outputs next to this file. ``UPDATE_GOLDEN=1`` rewrites them.

Scripts rely on the JSON; its keys are checked against the contract here too.
"""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from builders import CalledCli, Cli, Ran, some_bytes

HERE = Path(__file__).parent
CONFIG, FP32, FP16, NEWER = b'{"hidden": 384}\n', some_bytes(2_500_000, 1), some_bytes(900_000, 2), some_bytes(901_000, 3)
MANIFEST = """\
schema = 1

[models."minilm"]
version = "1.0.0"
sources = ["weights"]
default = "fp32"

[models."minilm".variants.fp32]
include = ["*.json", "model.safetensors"]

[models."minilm".variants.fp16]
include = ["*.json", "model.fp16.safetensors"]
rename = { "model.fp16.safetensors" = "model.safetensors" }
"""

NAMES = (
    "init",
    "missing-lock",
    "missing-lock-json",
    "no-manifest-json",
    "lock",
    "lock-json",
    "lock-check",
    "models-lock",
    "plan",
    "plan-json",
    "plan-check",
    "status-before",
    "status-before-json",
    "ensure",
    "reconcile-json",
    "reconcile-again",
    "plan-in-sync",
    "status",
    "status-json",
    "ls",
    "ls-json",
    "du",
    "du-json",
    "which",
    "which-json",
    "verify",
    "verify-json",
    "pin-json",
    "unpin-json",
    "unknown-model",
    "unknown-model-json",
    "missing-variant-json",
    "bad-selector-json",
    "usage-json",
    "lock-check-stale-json",
    "locked-stale-json",
    "stale-warning",
    "diff",
    "diff-json",
    "plan-upgrade-json",
    "reconcile-upgrade",
    "gc-dry-run-json",
    "gc",
    "drift-status-json",
    "drift-ensure-json",
    "corrupt-verify",
    "corrupt-verify-json",
    "repair-json",
    "no-source-json",
)


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[list[str], Ran]]:
    """Every output of the story by its name, with the command that gave it."""
    folder = tmp_path_factory.mktemp("story")
    cli, reported = CalledCli(folder), {}
    elsewhere = str(folder / "another-root")  # `lock` keeps what no listing names; the story wants to see it fetched

    def record(name: str, *args: str, **environ: str) -> Ran:
        reported[name] = (list(args), cli.run(*args, **environ))
        return reported[name][1]

    record("missing-lock", "reconcile")
    record("missing-lock-json", "reconcile", "--json")
    record("no-manifest-json", "lock", "--json")
    record("init", "init")
    source = folder / "weights"
    source.mkdir()
    for name, data in (("config.json", CONFIG), ("model.safetensors", FP32), ("model.fp16.safetensors", FP16)):
        (source / name).write_bytes(data)
    (folder / "models.toml").write_text(MANIFEST)
    record("lock", "lock", MODELSTOW_ROOT=elsewhere)
    record("lock-json", "lock", "--json", MODELSTOW_ROOT=elsewhere)
    record("lock-check", "lock", "--check")
    reported["models-lock"] = (["cat", "models.lock"], Ran(0, (folder / "models.lock").read_text(), ""))
    record("plan", "plan")
    record("plan-json", "plan", "--json")
    record("plan-check", "plan", "--check")
    record("status-before", "status")
    record("status-before-json", "status", "--json")
    record("ensure", "ensure", "minilm#fp16")
    record("reconcile-json", "reconcile", "--json")
    record("reconcile-again", "reconcile")
    record("plan-in-sync", "plan")
    record("status", "status")
    record("status-json", "status", "--json")
    record("ls", "ls")
    record("ls-json", "ls", "--json")
    record("du", "du")
    record("du-json", "du", "--json")
    config = "root/models/minilm@1.0.0/fp32/config.json"
    record("which", "which", config)
    record("which-json", "which", config, "--json")
    record("verify", "verify", "--full")
    record("verify-json", "verify", "--json")
    record("pin-json", "pin", "minilm#fp16", "--json")
    record("unpin-json", "unpin", "minilm#fp16", "--json")
    record("unknown-model", "ensure", "bert")
    record("unknown-model-json", "ensure", "bert", "--json")
    record("missing-variant-json", "ensure", "minilm#int8", "--json")
    record("bad-selector-json", "ensure", "../minilm", "--json")
    record("usage-json", "ensure", "--json")
    _upgrade(cli, record, elsewhere)
    _damage(cli, record)
    return reported


def _upgrade(cli: Cli, record: Callable[..., Ran], elsewhere: str) -> None:
    """A newer file, another manifest, a new lockfile."""
    (cli.folder / "weights" / "model.fp16.safetensors").write_bytes(NEWER)
    (cli.folder / "models.toml").write_text(MANIFEST.replace('default = "fp32"', 'default = "fp16"'))
    record("lock-check-stale-json", "lock", "--check", "--json")
    record("locked-stale-json", "plan", "--locked", "--json")
    record("stale-warning", "plan")
    (cli.folder / "models.lock").rename(cli.folder / "old.lock")
    cli.ok("lock", MODELSTOW_ROOT=elsewhere)
    record("diff", "diff", "old.lock", "models.lock")
    record("diff-json", "diff", "old.lock", "models.lock", "--json")
    record("plan-upgrade-json", "plan", "--json")
    record("reconcile-upgrade", "reconcile")
    record("gc-dry-run-json", "gc", "--dry-run", "--json")
    record("gc", "gc")


def _damage(cli: Cli, record: Callable[..., Ran]) -> None:
    """A file that the user replaced, a blob that rotted, a source that is gone."""
    tree = cli.root / "models" / "minilm@1.0.0" / "fp16"
    (tree / "config.json").unlink()
    (tree / "config.json").write_bytes(b"mine")
    (tree / "notes.txt").write_bytes(b"mine too")
    record("drift-status-json", "status", "minilm#fp16", "--json")
    record("drift-ensure-json", "ensure", "minilm#fp16", "--json")
    weights = tree / "model.safetensors"
    weights.chmod(0o644)
    weights.write_bytes(NEWER[:-1] + bytes([NEWER[-1] ^ 1]))
    record("corrupt-verify", "verify", "minilm#fp16")
    record("corrupt-verify-json", "verify", "minilm#fp16", "--json")
    record("repair-json", "verify", "minilm#fp16", "--repair", "--json")
    (cli.folder / "weights").rename(cli.folder / "gone")
    record("no-source-json", "ensure", "minilm#fp16", "--force", "--json")


def normal(args: list[str], ran: Ran, folder: Path) -> str:
    """An output as text that is the same everywhere: no temporary path, no time, no free space, no id."""
    out = ran.out
    if "--json" in args:
        assert out.count("\n") == 1, "one JSON document"
        out = json.dumps(json.loads(out), indent=1, ensure_ascii=False) + "\n"
    text = f"$ {'' if args[0] == 'cat' else 'modelstow '}{' '.join(args)}\n{out}"
    text += f"-- on stderr:\n{ran.err}" if ran.err else ""
    text += f"-- exit code {ran.code}\n" if ran.code else ""
    text = text.replace(str(folder), "FOLDER")
    text = re.sub(r'"seconds": [0-9.e-]+', '"seconds": 0', text)
    text = re.sub(r'"free_bytes": \d+', '"free_bytes": 0', text)
    text = re.sub(r"[0-9.]+ [kMGT]?B free", "0 B free", text)
    text = re.sub(r"[0-9.]+ [kMGT]?B/s", "0 B/s", text)
    text = re.sub(r"\b[0-9.]+ s\b", "0 s", text)
    return re.sub(r"(quarantine/)[^\s\"]*?([^/\s\"]*)(?=[\s\":]|$)", r"\1ID", text)


@pytest.mark.parametrize("name", NAMES)
def test_a_command_prints_what_it_printed_before(name, story):
    """Line by line and key by key, after what differs from run to run is taken out."""
    args, ran = story[name]
    folder = Path(story["lock-json"][1].json["lock"]).parent
    found, path = normal(args, ran, folder), HERE / f"{name}.txt"
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(found)

    assert found == path.read_text()


def test_every_golden_file_belongs_to_the_story():
    """No file is left of an earlier story."""
    assert sorted(path.stem for path in HERE.glob("*.txt")) == sorted(NAMES)


def test_no_output_holds_a_traceback(story):
    """Whatever goes wrong."""
    assert not [name for name, (_, ran) in story.items() if "Traceback" in ran.out + ran.err]


# ---- the keys of the contract

SUMMARY = {"fetched_blobs", "fetched_bytes", "resumed_bytes", "repaired_bytes", "reused_blobs", "reused_bytes"}
SUMMARY |= {"linked_files", "links", "seconds"}
LINKS = {"hardlink", "reflink", "symlink", "copy"}
PART = {"files", "bytes", "paths"}
ROWS: dict[str, dict[str, set[str]]] = {
    "plan": {
        "": {"changes", "actions", "summary"},
        "summary": {"fetch_blobs", "fetch_bytes", "link_files"} | {"remove_files", "disk_bytes", "free_bytes"},
    },
    "reconcile": {
        "": {"trees", "removed", "summary"},
        "trees[]": {"model", "variant", "path", "state", "changed"},
        "summary": SUMMARY,
    },
    "status": {
        "": {"models"},
        "models[]": {"model", "variant", "state", "path", "missing_files", "corrupt_files", "extra_files", "bytes_needed"},
    },
    "verify": {
        "": {"level", "checked", "faults", "repaired"},
        "checked": {"blobs", "files", "bytes", "seconds"},
        "faults[]": {"kind", "digest", "pieces", "bytes", "paths"},
        "repaired[]": {"digest", "pieces", "fetched_bytes"},
    },
    "gc": {
        "": {"dry_run", "removed", "reclaimed_bytes", "kept"},
        "removed": {"blobs", "trees", "partials"},
        "kept": {"blobs", "bytes"},
    },
    "lock": {"": {"lock", "changed", "models", "files", "blobs", "bytes", "warnings"}},
    "ls": {"": {"models"}, "models[]": {"model", "variant", "state", "path", "bytes", "pinned"}},
    "du": {
        "": {"trees", "totals"},
        "trees[]": {"model", "variant", "path", "logical", "shared", "unique"},
        "totals": {"logical", "physical", "reclaimable"},
    },
    "which": {"": {"path", "digest", "size", "models", "trees"}},
    "diff": {"": {"fetch", "keep", "drop"}, "fetch": PART, "keep": PART, "drop": PART},
    "pin": {"": {"changed"}},
    "unpin": {"": {"changed"}},
}
ROWS["ensure"] = ROWS["reconcile"]
ACTIONS = {
    "fetch": {"do", "digest", "size", "have", "url"},
    "link": {"do", "model", "variant", "path", "digest"},
    "replace": {"do", "model", "variant", "path", "digest"},
    "remove": {"do", "model", "variant", "path"},
}


def documents(story: dict[str, tuple[list[str], Ran]]) -> list[tuple[str, str, Any]]:
    return [(name, args[0], ran.json) for name, (args, ran) in story.items() if "--json" in args]


@pytest.mark.parametrize("name", [name for name in NAMES if name.endswith("-json")])
def test_the_keys_of_a_document_are_those_of_the_contract(name, story):
    """No more and no fewer, on every level; `displaced` may come in addition."""
    args, ran = story[name]
    document, keys = ran.json, set(ran.json)

    assert document["schema"] == 1 and document["ok"] is ("error" not in document)
    if "error" in document:
        assert set(document["error"]) == {"code", "message", "hint", "details"}
        assert ran.code != 0 and ran.err.startswith(("error: ", "note: ", "warning: "))
    keys -= {"schema", "ok", "error", "displaced"}
    rows = ROWS[args[0]]
    assert keys == rows[""] or (not keys and "error" in document)
    for place, expected in rows.items():
        for row in at(document, place) if place and keys else ():
            assert set(row) == expected, place
    if args[0] in ("reconcile", "ensure") and keys:
        assert set(document["summary"]["links"]) == LINKS
    for action in document.get("actions", ()):
        assert set(action) == ACTIONS[action["do"]]


def at(document: Any, place: str) -> list[Any]:
    value = document[place.removesuffix("[]")]
    return value if place.endswith("[]") else [value]


def test_the_story_shows_every_kind_of_row(story):
    """Else the keys above would be held against nothing."""
    assert story["verify-json"][1].json["level"] == "fast"
    assert story["corrupt-verify-json"][1].json["faults"] and story["repair-json"][1].json["repaired"]
    assert story["gc-dry-run-json"][1].json["removed"]["blobs"]
    assert {action["do"] for action in story["plan-upgrade-json"][1].json["actions"]} >= {"fetch", "replace"}
    assert story["drift-status-json"][1].json["models"][0]["extra_files"] == ["notes.txt"]


@pytest.mark.parametrize(
    ("name", "code", "exit_code"),
    [
        ("missing-lock-json", "LOCKFILE_INVALID", 2),
        ("no-manifest-json", "INVALID_CONFIG", 2),
        ("unknown-model-json", "MODEL_NOT_FOUND", 2),
        ("missing-variant-json", "VARIANT_NOT_FOUND", 2),
        ("bad-selector-json", "INVALID_MODEL_ID", 2),
        ("usage-json", "INVALID_CONFIG", 2),
        ("locked-stale-json", "LOCKFILE_STALE", 7),
        ("corrupt-verify-json", "INTEGRITY_FAIL", 4),
    ],
)
def test_an_error_has_the_code_of_the_contract(name, code, exit_code, story):
    """In the document and as the exit code, with a hint."""
    ran = story[name][1]

    assert (ran.json["error"]["code"], ran.code) == (code, exit_code) and ran.json["error"]["hint"]


@pytest.mark.parametrize(("name", "exit_code"), [("plan-check", 3), ("lock-check", 0), ("lock-check-stale-json", 7)])
def test_a_check_reports_by_its_exit_code(name, exit_code, story):
    """Work to do is no failure."""
    assert story[name][1].code == exit_code


def test_the_available_names_are_in_the_details(story):
    """So that a script can offer them."""
    assert story["unknown-model-json"][1].json["error"]["details"]["available_models"] == ["minilm@1.0.0"]
    assert story["missing-variant-json"][1].json["error"]["details"]["available_variants"] == ["fp16", "fp32"]
