"""models.toml: what its words mean, and the commands that edit it without losing a comment."""

import json
import tomllib
from pathlib import Path

import pytest
from builders import Cli

from modelstow.cas import Digest
from modelstow.reconcile.desired import manifest
from modelstow.reconcile.desired.lockfile import parse as parse_lock
from modelstow.reconcile.desired.selectors import select
from modelstow.reconcile.errors import (
    InvalidModelIdError,
    ManifestValidationError,
    ModelNotFoundError,
    VariantNotFoundError,
)

HEX = Digest.of(b"x").hex
ROW = f'{{ path = "a", size = 1, sha256 = "{HEX}" }}'


def read(text: str) -> manifest.Manifest:
    return manifest.parse(("schema = 1\n" + text).encode(), Path("/project/models.toml"))


def model(text: str, key: str = "m", version: str = 'version = "1"') -> str:
    return f'[models."{key}"]\n{version}\n{text}\n'


def test_a_variant_without_globs_includes_everything():
    """The default of include is ["**"], of exclude nothing."""
    found = read(model('sources = ["src"]\n[models."m".variants.v]')).models["m@1"]

    assert found.variants["v"].include == ("**",) and found.variants["v"].exclude == ()


def test_a_variant_that_lists_its_files_includes_nothing_else():
    """Then no source has to be listed, and none is needed."""
    found = read(model(f'[models."m".variants.v]\nfiles = [{ROW}]')).models["m@1"].variants["v"]

    assert found.include == () and [file.source_path for file in found.files] == ["a"]


def test_from_says_where_a_file_is_at_the_source():
    """The tree's path may be another."""
    listed = ROW.replace("size", 'from = "x/y", size')
    (file,) = read(model(f'sources = ["s"]\n[models."m".variants.v]\nfiles = [{listed}]')).models["m@1"].variants["v"].files

    assert (file.path, file.source_path, file.size, file.digest.hex) == ("a", "x/y", 1, HEX)


def test_the_version_may_be_part_of_the_key():
    """Several versions of a model are several tables; the same version given twice is no contradiction."""
    text = "".join(
        model(f'[models."{key}".variants.v]\nfiles = [{ROW}]', key=key, version=version)
        for key, version in (("m", 'version = "1.0.0"'), ("m@1.1.0", ""), ("m@2+cu12", 'version = "2+cu12"'))
    )

    assert set(read(text).models) == {"m@1.0.0", "m@1.1.0", "m@2+cu12"}


def test_one_version_in_two_tables_is_refused():
    """However it is written."""
    text = model(f'[models."m".variants.v]\nfiles = [{ROW}]') + model(
        f'[models."m@1".variants.v]\nfiles = [{ROW}]', key="m@1", version=""
    )

    with pytest.raises(ManifestValidationError, match="m@1"):
        read(text)


def test_the_only_variant_is_the_default():
    """With several variants there is no default unless it is given."""
    one, two = f"[models.m.variants.v]\nfiles = [{ROW}]\n", f"[models.m.variants.w]\nfiles = [{ROW}]\n"

    assert read(model(one)).models["m@1"].default == "v"
    assert read(model(one + two)).models["m@1"].default is None
    assert read(model('default = "w"\n' + one + two)).models["m@1"].default == "w"


def test_extends_in_a_circle_is_refused():
    """Two variants that start from each other have no files."""
    text = model('sources = ["s"]\n[models.m.variants.a]\nextends = ["m@1#b"]\n[models.m.variants.b]\nextends = ["m@1#a"]')

    with pytest.raises(ManifestValidationError, match="extends"):
        read(text)


def test_the_meaning_does_not_change_with_comments_order_or_spelling():
    """A lockfile does not become stale when the manifest is only reformatted."""
    one = 'pin = true\nsources = ["s/"]\n[models."m".variants.v]\nexclude = ["x"]\ninclude = ["*"]\n'
    other = '# tidy\nsources = ["s"] # here\npin = true\n[models.m.variants]\nv = { include = ["*"], exclude = ["x"] }\n'

    assert read(model(one)).meaning == read(model(other)).meaning


@pytest.mark.parametrize(
    "change",
    [
        '"s"->"t"',
        '"*"->"*.bin"',
        "pin = true->pin = false",
        '"x"->"y"',
        'version = "1"->version = "2"',
        "variants.v->variants.w",
    ],
)
def test_the_meaning_changes_with_what_a_lockfile_depends_on(change):
    """A lockfile made from another meaning is stale."""
    text = model('pin = true\nsources = ["s"]\n[models."m".variants.v]\ninclude = ["*"]\nexclude = ["x"]')
    old, new = change.split("->")

    assert old in text and read(text).meaning != read(text.replace(old, new)).meaning


def test_mirrors_are_read():
    """Places to ask first for any blob."""
    assert read('[mirrors]\nurls = ["https://mirror.example"]\n').mirrors == ("https://mirror.example",)


# ---- selectors


def locked(*keys: str, default: str | None = "fp32"):
    files = {"a": "sha256:" + HEX}
    models = {key: {"default": default, "variants": {"fp32": {"files": files}, "fp16": {"files": files}}} for key in keys}
    blobs = {"sha256:" + HEX: {"size": 1}}
    return parse_lock(json.dumps({"lock_version": 1, "models": models, "blobs": blobs}).encode())


@pytest.mark.parametrize("text", ["m", "m@1", "m#fp32", "m@1#fp32"])
def test_a_selector_means_one_variant(text):
    """A name alone is right where one version is locked, and means the default variant."""
    assert str(select(locked("m@1", "other@1"), text)) == "m@1#fp32"


def test_a_name_of_several_versions_lists_the_choices():
    """It would be a guess."""
    with pytest.raises(InvalidModelIdError) as refused:
        select(locked("m@1", "m@2"), "m")

    assert refused.value.details["available_models"] == ["m@1", "m@2"]
    assert "m@1" in str(refused.value) and "m@2" in str(refused.value)


def test_a_model_or_variant_that_is_not_there_lists_what_is():
    """The available names are in the details."""
    with pytest.raises(ModelNotFoundError) as refused:
        select(locked("m@1"), "n")
    assert refused.value.details["available_models"] == ["m@1"]
    with pytest.raises(VariantNotFoundError) as refused_variant:
        select(locked("m@1"), "m#int8")
    assert refused_variant.value.details["available_variants"] == ["fp16", "fp32"]
    with pytest.raises(VariantNotFoundError):
        select(locked("m@1", default=None), "m")


@pytest.mark.parametrize(
    "text", ["", "@1", "m@", "m#", "m@1#", "a/b/c", "../m", "m@1@2", "m#a#b", "CON", "m@1#a/b", "m.", "ü"]
)
def test_a_selector_that_is_none_is_refused(text):
    """As INVALID_MODEL_ID, whatever is locked."""
    with pytest.raises(InvalidModelIdError):
        select(locked("m@1"), text)


# ---- init, add, remove

COMMENTED = """\
# top of the file
schema = 1  # the format

# about a
[models."a"]
version = "1.0.0"  # fixed
sources = [
  "src/a",  # first
]
[models."a".variants.fp32]  # big
include = ["*.bin"]
# about b
[models."b@2"]
sources = ["src/b"]
[models."b@2".variants.v]
# the end
"""


def project(cli: Cli) -> Path:
    for name in ("a", "b", "c"):
        (cli.folder / "src" / name).mkdir(parents=True)
        (cli.folder / "src" / name / "w.bin").write_bytes(name.encode())
    return cli.folder / "models.toml"


def comments(text: str) -> set[str]:
    return {"#" + line.partition("#")[2] for line in text.splitlines() if "#" in line}


def test_init_writes_a_commented_manifest_that_is_good_as_it_is(cli):
    """And refuses to write over one."""
    ran = cli.ok("init", "--json")
    text = (cli.folder / "models.toml").read_text()

    assert ran.json["changed"] is True and len(comments(text)) > 5
    assert manifest.parse(text.encode(), cli.folder / "models.toml").models == {}
    again = cli.run("init", "--json")
    assert again.code == 2 and again.json["error"]["code"] == "INVALID_CONFIG"
    assert (cli.folder / "models.toml").read_text() == text
    cli.ok("lock")


def test_what_init_shows_in_comments_is_good_when_uncommented(cli):
    """People will take the marks away and run it."""
    cli.ok("init")
    lines = (cli.folder / "models.toml").read_text().splitlines()
    body = [line.removeprefix("# ").removeprefix("#") if n else line for n, line in enumerate(lines)]

    found = manifest.parse("\n".join(body).encode(), cli.folder / "models.toml")

    assert set(found.models["minilm@1.0.0"].variants) == {"fp32", "fp16"}


def test_add_keeps_every_comment_and_every_line(cli):
    """It only adds."""
    path = project(cli)
    path.write_text(COMMENTED)

    ran = cli.ok("add", "src/c", "--json")

    text = path.read_text()
    assert ran.json["changed"] is True and ran.json["model"] == "c@1.0.0"
    assert comments(COMMENTED) <= comments(text)
    assert all(line in text.splitlines() for line in COMMENTED.splitlines())
    assert set(manifest.parse(text.encode(), path).models) == {"a@1.0.0", "b@2", "c@1.0.0"}
    assert tomllib.loads(text)["models"]["c"]["sources"] == ["src/c"]


def test_add_of_a_known_model_adds_a_source(cli):
    """Behind the ones that are there; a second time changes nothing."""
    path = project(cli)
    path.write_text(COMMENTED)

    assert cli.ok("add", "src/c", "--name", "a", "--json").json["changed"] is True
    assert tomllib.loads(path.read_text())["models"]["a"]["sources"] == ["src/a", "src/c"]
    assert comments(COMMENTED) <= comments(path.read_text())
    before = path.read_bytes()
    assert cli.ok("add", "src/c", "--name", "a", "--json").json["changed"] is False
    assert path.read_bytes() == before


def test_add_of_another_version_is_another_table(cli):
    """Several versions of a model are several tables."""
    path = project(cli)
    path.write_text(COMMENTED)

    cli.ok("add", "src/c", "--name", "a", "--model-version", "2.0.0")

    assert set(manifest.parse(path.read_bytes(), path).models) == {"a@1.0.0", "a@2.0.0", "b@2"}


def test_add_without_a_manifest_writes_one_that_locks(cli):
    """The first command of a new project."""
    path = project(cli)

    cli.ok("add", "src/a", "--variant", "fp32", "--include", "*.bin", "--exclude", "*.txt")
    cli.ok("lock")

    assert manifest.parse(path.read_bytes(), path).models["a@1.0.0"].variants["fp32"].exclude == ("*.txt",)
    assert "src/a/w.bin" in (cli.folder / "models.lock").read_text()


@pytest.mark.parametrize("locator", ["https://u:p@h/x", "https://h/x?sig=s", "s3://k:s@b/x"])
def test_add_refuses_a_secret(locator, cli):
    """Nothing is written, and the secret is not repeated."""
    ran = cli.run("add", locator, "--name", "x", "--json")

    assert ran.code == 2 and ran.json["ok"] is False
    assert not (cli.folder / "models.toml").exists()
    assert "u:p@" not in ran.out + ran.err and "k:s@" not in ran.out + ran.err and "sig=s" not in ran.out + ran.err


def test_remove_takes_one_model_and_keeps_the_comments_of_the_others(cli):
    """The rest stays as it was written."""
    path = project(cli)
    path.write_text(COMMENTED)

    ran = cli.ok("remove", "b", "--json")

    text = path.read_text()
    assert ran.json["changed"] is True
    assert set(manifest.parse(text.encode(), path).models) == {"a@1.0.0"}
    kept = COMMENTED.partition("# about b")[0]
    assert all(line in text.splitlines() for line in kept.splitlines() if line)


def test_remove_then_add_still_locks(cli):
    """What the editing commands write, the others read."""
    path = project(cli)
    path.write_text(COMMENTED)

    cli.ok("remove", "a")
    cli.ok("add", "src/c")
    cli.ok("lock")

    assert set(json.loads((cli.folder / "models.lock").read_text())["models"]) == {"b@2", "c@1.0.0"}
    assert {"# top of the file", "# the format"} <= comments(path.read_text())


def test_remove_of_what_is_not_there_lists_what_is(cli):
    """Exit code 2, MODEL_NOT_FOUND."""
    project(cli).write_text(COMMENTED)

    ran = cli.run("remove", "x", "--json")

    assert ran.code == 2 and ran.json["error"]["code"] == "MODEL_NOT_FOUND"
    assert ran.json["error"]["details"]["available_models"] == ["a@1.0.0", "b@2"]


def test_the_manifest_is_found_in_a_folder_above(cli):
    """It is found as git finds its own; the lockfile is written next to it."""
    project(cli).write_text(COMMENTED)
    below = Cli(cli.folder / "src" / "a")

    below.ok("lock", MODELSTOW_ROOT=str(cli.root))

    assert (cli.folder / "models.lock").is_file() and not (below.folder / "models.lock").exists()


@pytest.mark.parametrize(
    ("locator", "what", "hint"),
    [
        ("hf://", "hub", "hf://org/name"),
        ("hf:///name", "hub", "hf://org/name"),
        ("hf://a b/c", "hub", "hf://org/name"),
        ("hf://org/name/../other", "hub", "hf://org/name"),
        ("s3://", "bucket", "s3://bucket/prefix"),
        ("http://", "server", "http://host/folder"),
        ("https:///models", "server", "https://host/folder"),
        ("file://", "host", "file:///path"),
        ("file://host/models", "host", "file:///path"),
        ("ftp://host/models", "not a supported scheme", "hf://"),
        ("org/name", "no folder", "hf://org/name"),
        ("org/name@main", "no folder", "hf://org/name@main"),
        ("nowhere", "no folder", "https://"),
        ("models.toml", "is a file", "folder"),
    ],
)
def test_add_refuses_what_is_no_source(locator: str, what: str, hint: str, cli: Cli):
    """Exit 2 before anything is written, with what to write instead."""
    path = project(cli)
    path.write_text(COMMENTED)

    ran = cli.run("add", locator, "--name", "x", "--json")

    assert ran.code == 2 and ran.json["error"]["code"] == "INVALID_CONFIG"
    assert what in ran.json["error"]["message"]
    assert hint in ran.json["error"]["hint"]
    assert path.read_text() == COMMENTED


@pytest.mark.parametrize("option", ["--variant", "--model-version", "--name"])
def test_add_refuses_a_bad_name(option: str, cli: Cli):
    """Before anything is written, saying which options choose another."""
    project(cli)

    ran = cli.run("add", "src/c", option, "a b")

    assert ran.code == 2 and "'a b' is not a" in ran.err and option in ran.err
    assert not (cli.folder / "models.toml").exists()


@pytest.mark.parametrize(
    "locator", ["hf://org/name", "hf://gpt2@main/onnx", "s3://bucket", "https://host", "src/a/", "src/.."]
)
def test_add_takes_every_kind_of_source(locator: str, cli: Cli):
    """What it writes can be read."""
    path = project(cli)

    cli.ok("add", locator, "--name", "x")

    assert manifest.read(path).models["x@1.0.0"].sources


@pytest.mark.parametrize("source", ["hf://", "hf://a b/c", "s3://", "https:///x", "file://host/x"])
def test_a_source_or_mirror_that_names_nothing_is_refused_with_its_place(source: str):
    """When the manifest is read, before any source is asked."""
    with pytest.raises(ManifestValidationError) as caught:
        read(model(f'sources = ["{source}"]\n[models."m".variants.v]\n') + f'[mirrors]\nurls = ["{source}"]\n')

    assert {p["place"] for p in caught.value.details["problems"]} == {'models."m".sources[0]', "mirrors.urls[0]"}


@pytest.mark.parametrize("mirror", ["ftp://host/x", "hf://", "https://me:canary@host/", "https://host/?sig=canary"])
def test_a_bad_mirror_in_the_environment_is_refused_by_its_variable(mirror: str, cli: Cli):
    """At once: nothing is asked of it, and again and again at that."""
    ran = cli.run("status", "--json", MODELSTOW_MIRRORS=f"/good,{mirror}")

    assert ran.code == 2 and ran.json["error"]["code"] == "INVALID_CONFIG"
    assert ran.json["error"]["message"].startswith("MODELSTOW_MIRRORS: ")
    assert ran.json["error"]["hint"] and "canary" not in ran.out + ran.err


def test_a_manifest_that_cannot_be_read_is_a_warning_if_there_is_a_lockfile(cli: Cli):
    """The lockfile is enough, and the warning says what the manifest adds. `lock` and --locked need the manifest."""
    path = project(cli)
    path.write_text(COMMENTED)
    cli.ok("lock")
    path.write_text(COMMENTED + '[mirrors]\nurls = ["ftp://host/x"]\n')

    ran = cli.ok("ensure", "--all")

    assert "it is not known whether the lockfile is stale, nor which mirrors it names" in ran.err
    assert "mirrors.urls[0]: ftp:// is not a supported scheme" in ran.err
    assert cli.run("lock").code == cli.run("ensure", "--all", "--locked").code == 2


def test_add_of_a_known_model_adds_a_variant_too(cli):
    """What was typed is done, or refused; never dropped."""
    path = project(cli)
    path.write_text(COMMENTED)
    cli.ok("add", "src/a", "--name", "a", "--variant", "small", "--include", "*.json")

    assert tomllib.loads(path.read_text())["models"]["a"]["variants"]["small"] == {"include": ["*.json"]}
    assert comments(COMMENTED) <= comments(path.read_text())
    again = cli.ok("add", "src/a", "--name", "a", "--variant", "small", "--include", "*.json", "--json").json
    assert again["changed"] is False
    refused = cli.run("add", "src/a", "--name", "a", "--variant", "small", "--include", "*.bin")
    assert refused.code == 2 and "takes other files" in refused.err


@pytest.mark.parametrize(
    ("locator", "model"),
    [
        ("https://host/models/minilm/1.2.0/", "minilm@1.2.0"),
        ("hf://org/Mini_LM@v1.0", "mini_lm@1.0.0"),
        ("s3://bucket/prefix/t2v/v2.1", "t2v@2.1"),
        ("https://host/3.0", "3.0@1.0.0"),
    ],
)
def test_add_takes_name_and_version_from_the_locator(cli, locator: str, model: str):
    """Name and version follow the folder layout of the recipes; options override them."""
    cli.ok("init")

    assert cli.ok("add", locator, "--json").json["model"] == model
    assert cli.ok("add", locator, "--name", "n", "--model-version", "9", "--json").json["model"] == "n@9"
