"""`lock`: which files a manifest means, what is asked of which source, and what stays as it was locked."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from builders import Cli, manifest_of, some_bytes
from origin import Fault, Origin

WEIGHTS, HALF, VAE = some_bytes(300_000, 1), some_bytes(150_000, 2), some_bytes(50_000, 3)
FILES = {
    "config.json": b'{"a": 1}',
    "vocab.txt": b"a b c",
    "README.md": b"# read me",
    "1_Pooling/config.json": b"{}",
    "model.safetensors": WEIGHTS,
    "model.fp16.safetensors": HALF,
    "vae/model.bin": VAE,
}


def put(cli: Cli, files: Mapping[str, bytes], folder: str = "src") -> None:
    for path, data in files.items():
        target = cli.folder / folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)


def write(cli: Cli, *tables: str) -> None:
    (cli.folder / "models.toml").write_text("schema = 1\n" + "\n".join(tables) + "\n")


def table(variant: str = "", sources: str = '"src"', name: str = "m", more: str = "") -> str:
    """One model of version 1 with one variant v."""
    head = f'[models."{name}"]\nversion = "1"\nsources = [{sources}]\n{more}\n'
    return f'{head}[models."{name}".variants.v]\n{variant}\n'


def locked(cli: Cli, name: str = "models.lock") -> Any:
    return json.loads((cli.folder / name).read_text())


def paths(cli: Cli, variant: str = "v", key: str = "m@1") -> list[str]:
    return sorted(locked(cli)["models"][key]["variants"][variant]["files"])


def urls(cli: Cli, data: bytes) -> list[str]:
    return locked(cli)["blobs"][name_of(data)]["urls"]


def name_of(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


def served(prefix: str = "m/", files: Mapping[str, bytes] = FILES) -> dict[str, bytes | Path]:
    return {prefix + path: data for path, data in files.items()}


# ---- which files


@pytest.mark.parametrize(
    ("variant", "expected"),
    [
        ("", sorted(FILES)),
        ('include = ["**"]', sorted(FILES)),
        ('include = ["*.json"]', ["1_Pooling/config.json", "config.json"]),
        ('include = ["/*.json"]', ["config.json"]),
        ('include = ["1_Pooling/**"]', ["1_Pooling/config.json"]),
        ('include = ["vae/"]', ["vae/model.bin"]),
        ('include = ["*.safetensors", "!*.fp16.*"]', ["model.safetensors"]),
        ('include = ["vocab.txt", "config.json"]', ["1_Pooling/config.json", "config.json", "vocab.txt"]),
        ('exclude = ["*.safetensors", "vae/**"]', ["1_Pooling/config.json", "README.md", "config.json", "vocab.txt"]),
        ('include = ["*.md", "*.txt"]\nexclude = ["README.md"]', ["vocab.txt"]),
        ('include = ["model.?p16.*", "[uv]*.txt"]', ["model.fp16.safetensors", "vocab.txt"]),
    ],
)
def test_globs_choose_as_gitignore_does(cli, variant, expected):
    """Include first, then exclude."""
    put(cli, FILES)
    write(cli, table(variant))

    cli.ok("lock")

    assert paths(cli) == expected


@pytest.mark.parametrize("variant", ['include = ["nothing.bin"]', 'include = ["*.nothing"]', 'exclude = ["**"]'])
def test_a_variant_without_files_is_an_error_of_the_manifest(cli, variant):
    """With its place, exit code 2, and no lockfile is written."""
    put(cli, FILES)
    write(cli, table(variant))

    ran = cli.run("lock", "--json")

    assert ran.code == 2 and ran.json["error"]["code"] == "MANIFEST_VALIDATION_ERROR"
    assert any("variants.v" in problem["place"] for problem in ran.json["error"]["details"]["problems"])
    assert not (cli.folder / "models.lock").exists()


def test_the_place_of_such_a_problem_is_as_the_manifest_writes_it(cli):
    """A key without a version in the manifest has none in the message."""
    put(cli, FILES)
    write(cli, table('include = ["nothing.bin"]'))

    ran = cli.run("lock", "--json")

    assert 'models."m".variants.v.include[0]' in [p["place"] for p in ran.json["error"]["details"]["problems"]]


def test_rename_changes_the_path_in_the_tree_and_not_at_the_source(cli):
    """Two variants may call their weights the same."""
    put(cli, FILES)
    write(
        cli, table('include = ["model.fp16.safetensors"]\nrename = { "model.fp16.safetensors" = "sub/model.safetensors" }')
    )

    cli.ok("lock")

    assert paths(cli) == ["sub/model.safetensors"]
    assert urls(cli, HALF) == ["src/model.fp16.safetensors"]


@pytest.mark.parametrize(
    "rename",
    [
        '{ "vocab.txt" = "config.json" }',
        '{ "nothing" = "x" }',
        '{ "vocab.txt" = "CONFIG.json" }',
        '{ "vocab.txt" = "vae" }',
    ],
)
def test_a_rename_onto_another_file_or_of_none_is_refused(cli, rename):
    """Neither may swallow a file in silence."""
    put(cli, FILES)
    write(cli, table(f"rename = {rename}"))

    assert cli.run("lock").code == 2


def test_index_takes_only_the_shards_that_it_names(cli):
    """Files next to them from another save are left out; other files are not affected by the index."""
    shards = {f"model-0000{n}-of-00002.safetensors": some_bytes(1000, n) for n in (1, 2)}
    index = json.dumps({"weight_map": {f"layer{n}": name for n, name in enumerate(shards)}}).encode()
    old = {"model-00001-of-00003.safetensors": b"old", "model.safetensors": b"old too"}
    other = {"config.json": b"{}", "vae/model.safetensors": b"another part"}
    put(cli, {**shards, **old, **other, "model.safetensors.index.json": index})
    write(cli, table('index = "model.safetensors.index.json"'))

    cli.ok("lock")

    assert paths(cli) == sorted([*shards, *other, "model.safetensors.index.json"])


@pytest.mark.parametrize("index", [b"{}", b"[]", b"not json", b'{"weight_map": {"a": "missing.safetensors"}}'])
def test_an_index_that_is_none_or_names_what_is_not_there_is_refused(cli, index):
    """Exit code 2, with its place."""
    put(cli, {"model.safetensors.index.json": index, "model.safetensors": b"x"})
    write(cli, table('index = "model.safetensors.index.json"'))

    ran = cli.run("lock", "--json")

    assert ran.code == 2
    assert any(problem["place"].endswith("variants.v.index") for problem in ran.json["error"]["details"]["problems"])


def test_extends_starts_from_the_files_of_another_variant(cli):
    """A LoRA is its base and its own file; its own files win."""
    put(cli, FILES)
    put(cli, {"lora.bin": b"lora", "config.json": b"other"}, "lora")
    overlay = table('extends = ["m@1#v"]\ninclude = ["**"]', name="lora", sources='"lora"')
    write(cli, overlay, table('include = ["config.json", "model.safetensors"]\nexclude = ["1_Pooling"]'))

    cli.ok("lock")

    assert paths(cli, key="lora@1") == ["config.json", "lora.bin", "model.safetensors"]
    files = locked(cli)["models"]["lora@1"]["variants"]["v"]["files"]
    assert files["config.json"] == name_of(b"other") and files["model.safetensors"] == name_of(WEIGHTS)
    assert urls(cli, WEIGHTS) == ["src/model.safetensors"]


def test_what_is_extended_changes_with_what_it_extends(cli):
    """Its entry depends on the tables behind it."""
    put(cli, FILES)
    overlay = table('extends = ["m@1#v"]', name="lora", sources="")
    write(cli, overlay, table('include = ["vocab.txt"]'))
    cli.ok("lock")
    write(cli, overlay, table('include = ["README.md"]'))

    cli.ok("lock")

    assert paths(cli, key="lora@1") == ["README.md"]


def test_components_name_paths_of_the_tree(cli):
    """After renaming, by code point; optional ones are kept apart by ensure."""
    put(cli, FILES)
    rename = 'rename = { "vocab.txt" = "vae/a.txt" }'
    write(cli, table(f'{rename}\ncomponents = {{ vae = ["vae/**"], text = ["*.md"] }}\noptional = ["vae"]'))
    cli.ok("lock")

    variant = locked(cli)["models"]["m@1"]["variants"]["v"]
    assert variant["components"] == {"text": ["README.md"], "vae": ["vae/a.txt", "vae/model.bin"]}
    assert variant["optional"] == ["vae"]
    (ready,) = cli.ok("ensure", "m").out.split()
    assert not (Path(ready) / "vae").exists() and (Path(ready) / "README.md").exists()
    cli.ok("ensure", "m", "--with", "vae", "--without", "text")
    assert (Path(ready) / "vae" / "model.bin").exists() and not (Path(ready) / "README.md").exists()


def test_pin_default_and_version_reach_the_lockfile(cli):
    """The version may be part of the key; the only variant is the default."""
    put(cli, FILES)
    write(cli, table(more="pin = true"), '[models."m@2"]\nsources = ["src"]\n[models."m@2".variants.w]\n')

    cli.ok("lock")

    models = locked(cli)["models"]
    assert models["m@1"]["pin"] is True and "pin" not in models["m@2"]
    assert models["m@2"]["default"] == "w"


def test_a_bare_name_and_its_default_are_the_same_tree(cli):
    """And another variant is another tree."""
    put(cli, FILES)
    write(cli, table('include = ["vocab.txt"]', more='default = "w"') + '[models."m".variants.w]\ninclude = ["*.md"]\n')
    cli.ok("lock")

    assert cli.ok("ensure", "m").out == cli.ok("ensure", "m@1#w").out != cli.ok("ensure", "m#v").out


# ---- folders


@pytest.mark.parametrize("source", ["src", "src/", "./src", "../{here}/src"])
def test_relative_folders_stay_relative_in_the_lock(cli, source):
    """With or without the last slash: a lockfile in git works wherever it is checked out."""
    put(cli, FILES)
    write(cli, table(sources=f'"{source.format(here=cli.folder.name)}"'))

    cli.ok("lock")

    text = (cli.folder / "models.lock").read_text()
    assert str(cli.folder) not in text
    assert all(not url.startswith("/") and url.count("src/") == 1 for url in urls(cli, WEIGHTS))
    (cli.folder / "elsewhere").mkdir()
    cli.ok("reconcile", "--lock", str(cli.folder / "models.lock"))


def test_locking_twice_gives_the_same_bytes(cli):
    """And says that nothing changed; in another place, with another store, too."""
    put(cli, FILES)
    write(cli, table(), table('include = ["*.bin"]', name="n"))
    first = cli.ok("lock", "--json")
    text = (cli.folder / "models.lock").read_bytes()
    second = cli.ok("lock", "--json")
    (cli.folder / "models.lock").unlink()
    cli.ok("lock", MODELSTOW_ROOT=str(cli.folder / "another"))

    assert first.json["changed"] is True and second.json["changed"] is False
    assert (cli.folder / "models.lock").read_bytes() == text
    assert {key: first.json[key] for key in ("models", "files", "blobs")} == {"models": 2, "files": 8, "blobs": 7}
    assert first.json["bytes"] == sum(map(len, FILES.values()))


# ---- HTTP


def test_of_a_listing_with_digests_no_content_is_asked(cli):
    """SHA256SUMS names the bytes and HEAD their number: `lock` reads no weights."""
    with Origin(served(), listing="sums") as origin:
        write(cli, table(sources=f'"{origin.url}/m/"'))
        cli.ok("lock")

        assert {seen.path for seen in origin.gets()} == {"m/SHA256SUMS"}
        assert sum(origin.sent(f"m/{path}") for path in FILES) == 0
        assert paths(cli) == sorted(FILES) and urls(cli, WEIGHTS) == [f"{origin.url}/m/model.safetensors"]
        cli.ok("reconcile")
        assert origin.sent("m/model.safetensors") == len(WEIGHTS)


@pytest.mark.parametrize("listing", ["index", "python"])
def test_of_an_index_page_each_file_is_fetched_once_and_kept(cli, listing):
    """What no listing names, `lock` fetches, proves and keeps: `reconcile` then fetches nothing."""
    with Origin(served(), listing=listing) as origin:
        write(cli, table(sources=f'"{origin.url}/m"'))
        cli.ok("lock")
        assert all(len(origin.gets(f"m/{path}")) == 1 for path in FILES)
        origin.forget()

        ran = cli.ok("reconcile", "--json")

        assert ran.json["summary"]["fetched_bytes"] == 0 and origin.requests == []
        assert paths(cli) == sorted(FILES)


def test_a_file_of_two_variants_is_fetched_once(cli):
    """A locator is a locator."""
    with Origin(served()) as origin:
        more = '[models."m".variants.w]\ninclude = ["*.safetensors"]'
        write(cli, table('include = ["*.safetensors", "vocab.txt"]', sources=f'"{origin.url}/m"') + more)
        cli.ok("lock")

        assert len(origin.gets("m/model.safetensors")) == 1


def test_links_out_of_the_folder_are_not_followed(cli):
    """An index page may not send us anywhere else."""
    page = b'<title>Index of /m/</title><a href="../up.bin">x</a><a href="/abs.bin">x</a><a href="http://h.invalid/x">x</a>'
    page += b'<a href="?C=N">x</a><a href="a.bin">a</a><a href="%2e%2e/b.bin">b</a>'
    with Origin({"m/": page, "m/a.bin": b"a", "up.bin": b"up", "abs.bin": b"abs", "b.bin": b"b"}) as origin:
        write(cli, table(sources=f'"{origin.url}/m"'))
        ran = cli.run("lock")

        assert {seen.path for seen in origin.gets()} <= {"m/SHA256SUMS", "m/", "m/a.bin"}
        assert ran.code == 2


def test_a_server_without_a_listing_is_exit_5_with_a_hint_to_list_files(cli):
    """The hint says what to write."""
    with Origin(served(), listing="none") as origin:
        write(cli, table(sources=f'"{origin.url}/m"'))

        ran = cli.run("lock", "--json")

    error = ran.json["error"]
    assert ran.code == 5 and error["code"] == "SOURCE_UNAVAILABLE" and "`files`" in error["hint"]
    assert [row["source"].rstrip("/") for row in error["details"]["sources"]] == [f"{origin.url}/m"]
    assert not (cli.folder / "models.lock").exists()


def test_files_listed_outright_need_no_network(cli):
    """Neither the first lock nor the second makes a request, even offline."""
    rows = ", ".join(
        f'{{ path = "{path}", size = {len(data)}, sha256 = "{hashlib.sha256(data).hexdigest()}" }}'
        for path, data in FILES.items()
    )
    with Origin(served(), listing="none") as origin:
        write(cli, table(f"files = [{rows}]", sources=f'"{origin.url}/m"'))
        cli.ok("lock", "--offline")
        cli.ok("lock")
        assert origin.requests == [] and not cli.root.exists()

        cli.ok("reconcile")

        assert origin.sent() == sum(map(len, FILES.values()))


def test_offline_forbids_to_list_a_network_source(cli):
    """Exit code 5, and no request was made."""
    with Origin(served()) as origin:
        write(cli, table(sources=f'"{origin.url}/m"'))
        assert cli.run("lock", "--offline").code == 5
        assert origin.requests == []


# ---- several sources


def test_the_first_source_that_answers_is_listed_and_the_others_are_not_read(cli):
    """They get their locator all the same, in the order of sources."""
    put(cli, FILES)
    with Origin(served()) as second:
        write(cli, table('include = ["vocab.txt"]', sources=f'"src", "{second.url}/m/"'))
        cli.ok("lock")

        assert second.requests == []
        assert urls(cli, FILES["vocab.txt"]) == ["src/vocab.txt", f"{second.url}/m/vocab.txt"]


def test_a_source_that_does_not_answer_is_passed_over_and_keeps_its_place(cli):
    """A dead server does not stop `lock`, and stays first in the lockfile."""
    with Origin(served()) as dead:
        url = dead.url
    put(cli, FILES)
    with Origin(served(), listing="sums") as alive:
        write(cli, table('include = ["vocab.txt"]', sources=f'"{url}/m", "{alive.url}/m", "src"'))
        cli.ok("lock")

        assert urls(cli, FILES["vocab.txt"]) == [f"{url}/m/vocab.txt", f"{alive.url}/m/vocab.txt", "src/vocab.txt"]


def test_where_no_source_answers_each_is_named_with_its_reason(cli):
    """Exit code 5; a denied one is exit code 8."""
    with Origin(served()) as origin:
        write(cli, table(sources=f'"nowhere", "{origin.url}/other"'))
        ran = cli.run("lock", "--json")
        assert ran.code == 5
        assert [bool(row["reason"]) for row in ran.json["error"]["details"]["sources"]] == [True, True]

        origin.fail("*", Fault(status=401, times=-1))
        ran = cli.run("lock", "--json")
        assert ran.code == 8 and ran.json["error"]["code"] == "AUTH_FAIL"


# ---- what stays locked


def test_an_unchanged_model_keeps_its_pins_while_another_changes(cli):
    """No request is made for it, although its source has something else now."""
    with Origin(served("a/", {"x": b"one"}), listing="sums") as a, Origin(served("b/", {"y": b"y"}), listing="sums") as b:
        other = table(sources=f'"{b.url}/b"', name="b")
        write(cli, table(sources=f'"{a.url}/a"', name="a"), other)
        cli.ok("lock")
        a.objects["a/x"] = b"two"
        a.forget()
        write(cli, table(sources=f'"{a.url}/a"', name="a"), table('include = ["y"]', sources=f'"{b.url}/b"', name="b"))

        cli.ok("lock")

        assert a.requests == [] and b.requests != []
        assert locked(cli)["models"]["a@1"]["variants"]["v"]["files"] == {"x": name_of(b"one")}


def test_upgrade_lists_again(cli):
    """One model by its name, or all."""
    with Origin(served("a/", {"x": b"one"}), listing="sums") as a, Origin(served("b/", {"x": b"1"}), listing="sums") as b:
        write(cli, table(sources=f'"{a.url}/a"', name="a"), table(sources=f'"{b.url}/b"', name="b"))
        cli.ok("lock")
        a.objects["a/x"], b.objects["b/x"] = b"two", b"2"
        a.forget(), b.forget()

        assert cli.ok("lock", "--json").json["changed"] is False
        assert a.requests == b.requests == []
        assert cli.ok("lock", "--upgrade", "b", "--json").json["changed"] is True
        assert a.requests == []
        assert locked(cli)["models"]["b@1"]["variants"]["v"]["files"] == {"x": name_of(b"2")}
        assert locked(cli)["models"]["a@1"]["variants"]["v"]["files"] == {"x": name_of(b"one")}
        cli.ok("lock", "--upgrade")
        assert locked(cli)["models"]["a@1"]["variants"]["v"]["files"] == {"x": name_of(b"two")}
        assert set(locked(cli)["blobs"]) == {name_of(b"2"), name_of(b"two")}


def test_upgrade_of_what_is_not_in_the_manifest_says_what_is(cli):
    """Exit code 2, MODEL_NOT_FOUND."""
    put(cli, FILES)
    write(cli, table())

    ran = cli.run("lock", "--upgrade", "x", "--json")

    assert ran.code == 2 and ran.json["error"]["details"]["available_models"] == ["m@1"]


def test_a_removed_model_leaves_nothing_in_the_lock(cli):
    """Neither its blobs nor its locators, not even of a file that another model shares."""
    put(cli, {"config.json": b"{}", "a.bin": b"a"}, "srcA")
    put(cli, {"config.json": b"{}", "b.bin": b"b"}, "srcB")
    a, b = table(sources='"srcA"', name="a"), table(sources='"srcB"', name="b")
    write(cli, a)
    cli.ok("lock")
    alone = (cli.folder / "models.lock").read_text()
    write(cli, a, b)
    cli.ok("lock")
    write(cli, a)

    cli.ok("lock")

    assert "srcB" not in (cli.folder / "models.lock").read_text()
    assert (cli.folder / "models.lock").read_text() == alone


# ---- stale


def test_check_is_7_where_stale_and_0_where_fresh(cli):
    """It writes nothing and makes no request."""
    put(cli, FILES)
    write(cli, table())
    assert cli.run("lock", "--check").code == 7 and not (cli.folder / "models.lock").exists()
    cli.ok("lock")
    before = (cli.folder / "models.lock").read_bytes()

    assert cli.run("lock", "--check", "--json").json["changed"] is False
    write(cli, "# a comment changes nothing", table())
    assert cli.run("lock", "--check").code == 0
    write(cli, table('exclude = ["README.md"]'))
    ran = cli.run("lock", "--check", "--json")

    assert ran.code == 7 and ran.json["ok"] is True and ran.json["changed"] is True
    assert (cli.folder / "models.lock").read_bytes() == before


@pytest.mark.parametrize("command", [["status"], ["plan"], ["ensure", "m"], ["reconcile"]])
def test_a_stale_lock_is_used_with_a_warning_and_refused_with_locked(cli, command):
    """On stderr; --locked ends with 7 and does nothing."""
    put(cli, FILES)
    write(cli, table())
    cli.ok("lock")
    write(cli, table('exclude = ["README.md"]'))

    refused = cli.run(*command, "--locked", "--json")
    assert (
        refused.code == 7 and refused.json["error"]["code"] == "LOCKFILE_STALE" and "lock" in refused.json["error"]["hint"]
    )
    assert not list((cli.root / "models").iterdir())
    ran = cli.ok(*command, "--json")
    assert ran.json["ok"] is True and "warning" in ran.err and "modelstow lock" in ran.err


def test_without_a_manifest_the_lock_is_enough(cli):
    """The other commands need none, and say nothing."""
    put(cli, FILES)
    write(cli, table())
    cli.ok("lock")
    (cli.folder / "models.toml").unlink()

    ran = cli.ok("reconcile", "--json", "--locked")

    assert ran.json["trees"][0]["state"] == "COMPLETE" and "warning" not in ran.err


@pytest.mark.parametrize("command", [["status"], ["plan"], ["ls"], ["ensure", "m"], ["reconcile"]])
def test_without_a_lockfile_it_is_exit_2_with_a_hint(cli, command):
    """The hint is `modelstow lock`."""
    ran = cli.run(*command, "--json")

    assert ran.code == 2 and ran.json["error"]["code"] == "LOCKFILE_INVALID"
    assert "modelstow lock" in ran.json["error"]["hint"] and not cli.root.exists()


def test_the_hint_is_the_same_next_to_a_manifest(cli):
    """The most common case: nothing was locked yet."""
    put(cli, FILES)
    write(cli, table())

    ran = cli.run("reconcile", "--json")

    assert ran.code == 2 and "modelstow lock" in ran.json["error"]["hint"]


def test_a_listing_that_fails_for_a_moment_is_asked_for_again(cli: Cli):
    """As a file is; a source that says 404 is not."""
    with Origin({"m/a.bin": b"a"}, listing="sums") as origin:
        (cli.folder / "models.toml").write_text(manifest_of(f"{origin.url}/m"))
        origin.fail("m/SHA256SUMS", Fault(status=502))

        assert cli.ok("lock", "--json").json["files"] == 1
        assert len(origin.gets("m/SHA256SUMS")) == 2


def test_another_source_is_listed_before_one_that_failed_for_a_moment_is_asked_again(cli: Cli):
    """There is no wait while another source is left."""
    with Origin({"m/a.bin": b"a"}, listing="sums") as broken, Origin({"m/a.bin": b"a"}, listing="sums") as good:
        (cli.folder / "models.toml").write_text(manifest_of(f"{broken.url}/m", f"{good.url}/m"))
        broken.fail("*", Fault(status=502, times=-1))

        assert cli.ok("lock", "--json").json["files"] == 1
        assert len(broken.gets()) == 1


def test_models_may_extend_variants_of_each_other(cli):
    """Only a variant that needs itself has no end."""
    put(cli, FILES)
    tables = "".join(
        f"""[models.{name}]
version = "1"
sources = ["src"]
[models.{name}.variants.base]
include = ["*.json"]
[models.{name}.variants.more]
extends = ["{other}@1#base"]
include = ["*.json"]
"""
        for name, other in ("ab", "ba")
    )
    (cli.folder / "models.toml").write_text(f"schema = 1\n{tables}")

    cli.ok("lock")
    assert "unchanged" in cli.ok("lock").out
