"""The text of models.lock: one form, read back as written, and what a reader lets through."""

import json
import random
from dataclasses import replace

import pytest
from builders import lock_of
from hypothesis import given
from hypothesis import strategies as st
from strategies import DIGESTS, lockfiles

from modelstow.cas import Digest
from modelstow.reconcile.desired.lockfile import LockedBlob, LockedModel, LockedVariant, Lockfile, parse, read
from modelstow.reconcile.errors import LockfileInvalidError, SchemaVersionError

TOP = ["lock_version", "manifest", "models", "blobs"]


def shuffled(lock: Lockfile, seed: int) -> Lockfile:
    """The same lockfile with every mapping in another order."""
    dice = random.Random(seed)

    def mixed(table):
        rows = list(table.items())
        dice.shuffle(rows)
        return dict(rows)

    models = {}
    for key, model in mixed(lock.models).items():
        variants = {
            name: replace(variant, files=mixed(variant.files), components=mixed(variant.components))
            for name, variant in mixed(model.variants).items()
        }
        models[key] = replace(model, variants=variants)
    return Lockfile(manifest=lock.manifest, models=models, blobs=mixed(lock.blobs))


@given(lockfiles())
def test_what_was_written_is_read_back_equal(lock):
    """parse after format is the identity."""
    assert parse(lock.format().encode()) == lock


@given(lockfiles())
def test_writing_what_was_read_gives_the_same_bytes(lock):
    """format after parse after format is format."""
    text = lock.format()

    assert parse(text.encode()).format() == text


@given(lockfiles(), st.integers(0, 5))
def test_the_text_does_not_depend_on_the_order_of_mappings(lock, seed):
    """Whatever order the tables are in, the bytes are the same."""
    assert shuffled(lock, seed).format() == lock.format()


@given(lockfiles())
def test_keys_are_in_the_order_of_the_format(lock):
    """Top-level keys as shown, all others by code point."""
    tables = []
    json.loads(lock.format(), object_pairs_hook=lambda pairs: tables.append([key for key, _ in pairs]) or dict(pairs))

    assert tables.pop() == TOP
    assert all(keys == sorted(keys) for keys in tables)


@given(lockfiles())
def test_every_file_and_every_blob_has_a_line_of_its_own(lock):
    """One file a line, LF, UTF-8 as it is, no trailing spaces, one newline at the end."""
    text = lock.format()
    lines = [line.strip().removesuffix(",") for line in text.split("\n")]

    for model in lock.models.values():
        for variant in model.variants.values():
            for path, digest in variant.files.items():
                assert f"{json.dumps(path, ensure_ascii=False)}: {json.dumps(digest)}" in lines
    files = sum(len(variant.files) for model in lock.models.values() for variant in model.variants.values())
    assert sum('": "sha256:' in line for line in lines if not line.startswith(('"manifest', '"entry'))) == files
    assert sum(line.startswith('"sha256:') for line in lines) == len(lock.blobs)
    assert "\r" not in text and text.endswith("}\n") and not text.endswith("\n\n")
    assert not any(line != line.rstrip() for line in text.split("\n"))


def test_the_text_is_the_one_that_the_contract_shows():
    """The form itself, to the letter, so that a change of it is noticed."""
    weights, config = b"weights", b"{}"
    lock = lock_of({"minilm@1.0.0": {"fp16": {"model.bin": weights, "config.json": config}}}, ["https://h.example/m"])
    lock = replace(lock, manifest="sha256:" + "a" * 64)
    blobs = sorted(
        f'  "{Digest.of(data)}": {{"size": {len(data)}, "urls": ["https://h.example/m/{path}"]}}'
        for path, data in (("model.bin", weights), ("config.json", config))
    )

    assert lock.format() == "\n".join(
        [
            "{",
            ' "lock_version": 1,',
            ' "manifest": "sha256:' + "a" * 64 + '",',
            ' "models": {',
            '  "minilm@1.0.0": {',
            '   "default": "fp16",',
            '   "variants": {',
            '    "fp16": {',
            '     "files": {',
            f'      "config.json": "{Digest.of(config)}",',
            f'      "model.bin": "{Digest.of(weights)}"',
            "     }",
            "    }",
            "   }",
            "  }",
            " },",
            ' "blobs": {',
            blobs[0] + ",",
            blobs[1],
            " }",
            "}",
            "",
        ]
    )


def test_urls_keep_the_order_of_sources():
    """The first source stays first; nothing sorts them."""
    lock = lock_of({"m@1": {"v": {"x": b"x"}}}, ["https://z.example", "https://a.example"])

    back = parse(lock.format().encode())

    assert back.blobs[Digest.of(b"x")].urls == ("https://z.example/x", "https://a.example/x")


def test_keys_that_are_not_known_are_ignored():
    """A later modelstow may add keys within this version, anywhere."""
    lock = lock_of({"m@1": {"v": {"x": b"x"}}})
    document = json.loads(lock.format())
    document["new"] = {"a": [1, {"b": None}]}
    document["models"]["m@1"]["new"] = 1.5
    document["models"]["m@1"]["variants"]["v"]["new"] = ["x"]
    document["blobs"][str(Digest.of(b"x"))]["new"] = -1

    assert parse(json.dumps(document).encode()) == lock


def test_any_json_layout_is_read():
    """What `jq` or an editor reformats is the same lockfile."""
    lock = lock_of({"m@1": {"v": {"é x": b"x"}}})
    document = json.loads(lock.format())

    for text in (json.dumps(document), json.dumps(document, indent=8), json.dumps(document, sort_keys=True)):
        assert parse(text.encode()) == lock


def test_urls_may_be_missing_and_manifest_too():
    """What has a sensible default needs no key."""
    digest = str(DIGESTS[0])
    document = {"lock_version": 1, "models": {}, "blobs": {digest: {"size": 3}}}

    lock = parse(json.dumps(document).encode())

    assert lock.blobs == {DIGESTS[0]: LockedBlob(size=3)} and lock.manifest == ""


@pytest.mark.parametrize("version", [2, 3, 10**30])
def test_a_later_version_is_refused_by_name(version):
    """The message names the file, the version found and the version read."""
    raw = json.dumps({"lock_version": version, "models": "whatever"}).encode()

    with pytest.raises(SchemaVersionError) as refused:
        parse(raw, "some/models.lock")

    assert refused.value.code == "SCHEMA_VERSION_MISMATCH"
    assert refused.value.details == {"found_version": version, "supported_versions": [1]}
    assert "some/models.lock" in str(refused.value) and str(version) in str(refused.value) and refused.value.hint


@pytest.mark.slow
def test_a_hundred_thousand_files_are_read():
    """A lockfile of this size is ordinary."""
    files = {f"shard-{n // 1000:03}/file-{n:06}.bin": DIGESTS[n % 5] for n in range(100_000)}
    blobs = {digest: LockedBlob(size=1, urls=("mem://o/x",)) for digest in DIGESTS}
    model = LockedModel(variants={"v": LockedVariant(files=files)}, default="v")
    text = Lockfile(manifest="", models={"m@1": model}, blobs=blobs).format()

    lock = parse(text.encode())

    assert lock.models["m@1"].variants["v"].files == files


def test_a_lockfile_is_read_once(tmp_path):
    """The bytes that were checked are handed back, since the file may change meanwhile."""
    path = tmp_path / "models.lock"
    lock = lock_of({"m@1": {"v": {"x": b"x"}}})
    path.write_text(lock.format())

    found, raw = read(path)
    path.write_text("gone")

    assert found == lock and raw == lock.format().encode()


def test_all_problems_are_reported_together():
    """Each with its place; the first does not hide the others."""
    digest, other = str(DIGESTS[0]), str(DIGESTS[1])
    document = {
        "lock_version": 1,
        "manifest": 5,
        "models": {
            "m@1": {"default": "nope", "pin": "yes", "variants": {"v": {"files": {"../up": digest, "ok": other}}}},
            "n": {"variants": {"v": {"files": {}, "components": {"c": ["x"]}, "optional": ["d"]}}},
        },
        "blobs": {digest: {"size": -1, "urls": []}, "sha256:short": {"size": 1}},
    }

    with pytest.raises(LockfileInvalidError) as refused:
        parse(json.dumps(document).encode())

    places = [problem["place"] for problem in refused.value.details["problems"]]
    assert {
        "manifest",
        "models['m@1'].default",
        "models['m@1'].pin",
        "models['m@1'].variants['v'].files['../up']",
        "models['m@1'].variants['v'].files['ok']",
        "models['n']",
        "models['n'].variants['v'].components['c']",
        "models['n'].variants['v'].optional",
        f"blobs['{digest}'].size",
        "blobs['sha256:short']",
    } <= set(places)
    assert all(
        f"{problem['place']}: {problem['message']}" in str(refused.value) for problem in refused.value.details["problems"]
    )
    assert refused.value.hint


def test_components_choose_files():
    """Optional parts stay out unless asked for; what a chosen part also names stays."""
    variant = LockedVariant(
        files={"a": DIGESTS[0], "vae/x": DIGESTS[1], "te/y": DIGESTS[2], "both": DIGESTS[3]},
        components={"vae": ("both", "vae/x"), "te": ("both", "te/y")},
        optional=("te",),
    )

    assert set(variant.select_files()) == {"a", "both", "vae/x"}
    assert set(variant.select_files(with_=["te"])) == {"a", "both", "vae/x", "te/y"}
    assert set(variant.select_files(without=["vae"])) == {"a"}
    assert set(variant.select_files(with_=["te"], without=["vae"])) == {"a", "both", "te/y"}


def test_a_lockfile_larger_than_64_mib_is_refused_before_it_is_parsed():
    """Blanks are good JSON, and as many of them as one likes would fill the memory."""
    with pytest.raises(LockfileInvalidError, match="larger than 67,108,864 bytes"):
        parse(b" " * ((64 << 20) + 1))
