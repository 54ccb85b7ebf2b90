"""Crafted names, numbers and documents: refused whole, before anything is touched."""

import json
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import pytest
from builders import CalledCli
from hub import Hub
from hypothesis import given
from hypothesis import strategies as st
from strategies import TOML_LINES, almost_lockfiles, json_values, lockfiles, toml_texts

from modelstow.backends import Listed, Listing, Registry
from modelstow.backends.hf.hub import HubSource
from modelstow.cas import Digest
from modelstow.reconcile.desired import lockfile, manifest
from modelstow.reconcile.desired.resolver import resolve
from modelstow.reconcile.errors import LockfileInvalidError, ManifestValidationError, ModelstowError, SchemaVersionError

DIGEST = str(Digest.of(b"x"))
HEX = DIGEST.removeprefix("sha256:")
OTHER = str(Digest.of(b"y"))
TOML = Path("/project/models.toml")

# ---- the names

RESERVED = ["CON", "PRN", "AUX", "NUL", "CONIN$", "CONOUT$"]
RESERVED += [f"{port}{n}" for port in ("COM", "LPT") for n in "123456789¹²³"]
BIDI = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
CONTROLS = [chr(n) for n in (*range(0x20), *range(0x7F, 0xA0))]
SURROGATES = ["\ud800", "\udbff", "\udc00", "\udc80", "\udfff", "\udfff\ud800"]

BAD_PATHS = [
    "", "/", "//", "///", ".", "..", "...", "./", "../", "./a", "../a", "../../a", "a/..", "a/../b", "a/../../b", "a/.",
    "a/./b", "/a", "//a", "//host/share/a", "a//b", "a/", "a//", "a/b/", "/etc/passwd", "../../../../etc/passwd",
    "a/..//b", ".../a", "a/...", "a/ ..", "a/.. /b", ". ", " .", ".. ", "\\", "\\a", "a\\b", "..\\a", "a\\..\\b", "a\\",
    "\\\\host\\share", "\\\\?\\C:\\a", "C:", "c:a", "C:/a", "C:\\a", "z:/x", "Z:", "file:///etc/passwd", "http://h/a",
    "a.", "a..", "a. ", "a ", "a  ", " ", "  ", "a./b", "a /b", "a/b.", "a/b ", "a/ /b", "a. /b", "x" * 256, "é" * 128,
    "d/" + "x" * 256, "x" * 256 + "/f", "x/" * 2500 + "x", ("y" * 250 + "/") * 17 + "y", "\u2028", "a\u2029b",
    "a\r\nb", "a\n", "\na", "a\0", "\0", "a\0.bin", "a/\0/b", "a:b", "a:$DATA", "a::$INDEX_ALLOCATION",
]  # fmt: skip
BAD_PATHS += [text for c in '<>:"|?*' for text in (c, f"{c}a", f"a{c}", f"a{c}b", f"{c}/a", f"d/a{c}")]
BAD_PATHS += [f"a{c}b" for c in CONTROLS] + [f"d{c}/f" for c in CONTROLS[:8]]
BAD_PATHS += [text for c in BIDI for text in (f"a{c}b", f"{c}/f")]
BAD_PATHS += [text for c in SURROGATES for text in (f"a{c}b", c)]
BAD_PATHS += [text for n in RESERVED for text in (n, n.lower(), f"{n}.txt", f"{n.title()}.tar.gz", f"d/{n}", f"{n}/f")]
BAD_PATHS += [f"{n} .txt" for n in ("con", "NUL", "com1")]
BAD_PATHS = list(dict.fromkeys(BAD_PATHS))

GOOD_PATHS = [
    "a", "a b", "a  b", " a", ".a", "..a", "...a", ".gitattributes", "a.b.c", "a..b", "~", "~root", "~/x", "#", "#a#", "%",
    "%2e%2e", "%00", "$HOME", "`id`", "$(id)", "a;b", "a&b", "'a'", "!", "-", "--", "-rf", "@", "+", "=", ",", "[a]", "{a}",
    "(a)", "^", "a,b", "été", "E\u0301te\u0301", "模型.bin", "модель", "🤗", "𝔘nicode", "ß", "ﬁ", "Ω", "İ", "com", "com10",
    "lpt", "console", "CONfig.json", "nul_", "nulls.txt", "aux-1", "d/.a/..b", "x" * 255, "é" * 127 + "x", "a\u00a0b",
    "a\u200db", "d/" * 20 + "f", "xcon", "x.con", "COM0x", "C", "c/a", "prn-data/x",
]  # fmt: skip

COLLISIONS = [
    ("a", "A"), ("d/a", "D/a"), ("d/x", "D/X"), ("Config.json", "config.JSON"),
    (unicodedata.normalize("NFC", "é"), unicodedata.normalize("NFD", "é")), ("É", "e\u0301"), ("straße", "STRASSE"),
    ("ﬁ", "FI"), ("K", "\u212a"), ("ς", "Σ"), ("Å", "\u212b"), ("a", "a/b"), ("a/b", "a/b/c/d"), ("A", "a/b"),
    ("é", "e\u0301/f"), ("a/b/c", "a/B"),
]  # fmt: skip


def test_the_table_is_as_long_as_was_promised():
    """At least three hundred different hostile paths."""
    assert len(set(BAD_PATHS)) >= 300


@pytest.fixture
def cli(tmp_path: Path) -> CalledCli:
    """The command line as a function, in an empty folder with an empty store."""
    return CalledCli(tmp_path)


def shown(path: object) -> str:
    return ascii(path)[:40]


def misses(paths: Iterable[str], check: Callable[[str], None]) -> list[str]:
    """Every path for which *check* fails, with the first line of its failure."""
    found = []
    for path in paths:
        try:
            check(path)
        except (Exception, pytest.fail.Exception) as error:
            found.append(f"{shown(path)}: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}")
    return found


def assert_no_miss(paths: Sequence[str], check: Callable[[str], None]) -> None:
    """Run *check* for every path and report all paths for which it fails together."""
    found = misses(paths, check)
    assert not found, f"{len(found)} of {len(paths)} paths:\n" + "\n".join(found)


def lock_text(files: object, blobs: object = None, **more: object) -> bytes:
    """A lockfile with these files, as it could be written by hand."""
    blobs = {DIGEST: {"size": 1, "urls": []}} if blobs is None else blobs
    models = {"m@1": {"variants": {"v": {"files": files}}}}
    return json.dumps({"lock_version": 1, "manifest": "", "models": models, "blobs": blobs, **more}).encode()


def toml_string(text: str) -> str:
    """A TOML basic string; what TOML cannot hold stays for its parser to refuse."""
    return "".join(f"\\u{ord(c):04x}" if ord(c) < 32 or ord(c) == 127 or c in '"\\' else c for c in text)


def manifest_text(*rows: str) -> bytes:
    text = 'schema = 1\n[models."m"]\nversion = "1"\n[models."m".variants.v]\nfiles = [\n' + ",\n".join(rows) + "\n]\n"
    return text.encode("utf-8", "surrogatepass")


def row(path: str, **more: str) -> str:
    fields = {"path": f'"{toml_string(path)}"', "size": "1", "sha256": f'"{HEX}"', **more}
    return "{ " + ", ".join(f"{key} = {value}" for key, value in fields.items()) + " }"


def refused_lock(raw: bytes) -> list[str]:
    """The places of the problems that the lockfile was refused for."""
    with pytest.raises(LockfileInvalidError) as refused:
        lockfile.parse(raw)
    assert refused.value.details["problems"]
    str(refused.value).encode()  # what is reported can be printed
    return [problem["place"] for problem in refused.value.details["problems"]]


def refused_manifest(raw: bytes) -> list[str]:
    with pytest.raises(ManifestValidationError) as refused:
        manifest.parse(raw, TOML)
    assert refused.value.details["problems"]
    str(refused.value).encode()
    return [problem["place"] for problem in refused.value.details["problems"]]


def test_a_hostile_path_is_refused_in_a_lockfile():
    """The whole lockfile is refused and the place of the path is reported."""

    def check(path: str) -> None:
        places = refused_lock(lock_text({"good": DIGEST, path: DIGEST}))
        assert f"models['m@1'].variants['v'].files[{path[:80]!a}]" in places

    assert_no_miss(BAD_PATHS, check)


def test_a_hostile_path_is_refused_in_a_manifest():
    """A listed file is refused for its path and for its path at the source."""

    def check(path: str) -> None:
        places = refused_manifest(manifest_text(row("good"), row(path)))
        from_places = refused_manifest(manifest_text(row("good", **{"from": f'"{toml_string(path)}"'})))
        if not any(0xD800 <= ord(c) <= 0xDFFF for c in path):  # no TOML can hold those
            assert 'models."m".variants.v.files[1].path' in places
            assert 'models."m".variants.v.files[0].from' in from_places

    assert_no_miss(BAD_PATHS, check)


def test_the_loop_over_paths_reports_every_path_that_is_not_refused():
    """A good path among hostile ones is named, and the loop does not end at it."""
    found = misses(["..", "good", "a/../b", "fine"], lambda path: refused_lock(lock_text({path: DIGEST})) and None)

    assert [line.partition(":")[0] for line in found] == ["'good'", "'fine'"]


@pytest.mark.parametrize("path", GOOD_PATHS, ids=shown)
def test_an_unusual_path_that_is_good_is_accepted(path):
    """Unicode, spaces and dots inside, leading dots, 255 bytes, and characters that only shells care about."""
    lock = lockfile.parse(lock_text({path: DIGEST}))
    read = manifest.parse(manifest_text(row(path)), TOML)

    assert set(lock.models["m@1"].variants["v"].files) == {path}
    assert [file.path for file in read.models["m@1"].variants["v"].files] == [path]


@pytest.mark.parametrize(("one", "other"), COLLISIONS, ids=shown)
def test_two_paths_that_are_one_somewhere_are_refused(one, other):
    """Equal after NFC and case folding, or file and folder; in both orders, with one of the two reported."""
    for first, second in ((one, other), (other, one)):
        if first == second:
            continue
        places = refused_lock(lock_text({first: DIGEST, second: DIGEST}))
        assert set(places) & {f"models['m@1'].variants['v'].files[{path!a}]" for path in (first, second)}
        places = refused_manifest(manifest_text(row("x"), row(first), row(second)))
        assert set(places) & {f'models."m".variants.v.files[{n}].path' for n in (1, 2)}


def test_a_path_that_is_listed_twice_names_both_indices():
    """A manifest's rows are reported by their numbers."""
    with pytest.raises(ManifestValidationError, match=r"files\[2\]\.path: .*files\[0\]\.path"):
        manifest.parse(manifest_text(row("a"), row("b"), row("a")), TOML)


BAD_IDS = [
    "m", "m@", "@1", "@", "", "a@1@2", "a b@1", " a@1", "a@1 ", "a/b/c@1", "/a@1", "a/@1", "../a@1", "a/..@1", ".a@1",
    "-a@1", "_a@1", "a//b@1", "ü@1", "a\\b@1", "C:a@1", "a.@1", "a@1.", "CON@1", "nul.txt@1", "x/aux@1", "a@NUL",
    "a@1/2", "a@..", "a@-1", "a@+1", "a#b@1", "a@1#v", "a\n@1", "a@1\n", "a\0@1", "\ud800@1", "a@\u202e1", "x" * 256 + "@1",
    "a@" + "1" * 256,
]  # fmt: skip
BAD_VARIANTS = [
    "",
    "a/b",
    ".",
    "..",
    ".a",
    "-a",
    "_a",
    "a b",
    "a+b",
    "ü",
    "CON",
    "aux.x",
    "a.",
    "a\n",
    "\ud800",
    "x" * 256,
    "a@1",
]


@pytest.mark.parametrize("key", BAD_IDS, ids=shown)
def test_a_hostile_model_id_is_refused(key):
    """A model's key is name@version, and both are names for folders."""
    assert f"models[{key[:80]!a}]" in refused_lock(lock_text({}, models={"m@1": {"variants": {}}, key: {"variants": {}}}))


@pytest.mark.parametrize("name", BAD_VARIANTS, ids=shown)
def test_a_hostile_variant_name_is_refused(name):
    """A variant is one segment."""
    models = {"m@1": {"variants": {name: {"files": {"a": DIGEST}}}}}

    assert f"models['m@1'].variants[{name[:80]!a}]" in refused_lock(lock_text({}, models=models))


@pytest.mark.parametrize(("one", "other"), [("m@1", "M@1"), ("a/B@1", "a/b@1"), ("m@1a", "m@1A")])
def test_two_models_that_are_one_folder_somewhere_are_refused(one, other):
    """No two names may be equal after case folding."""
    refused_lock(lock_text({}, models={one: {"variants": {}}, other: {"variants": {}}}))
    file = f"files = [{row('a')}]"
    text = f'schema = 1\n[models."{one}".variants.v]\n{file}\n[models."{other}".variants.v]\n{file}\n'
    refused_manifest(text.encode())


def test_two_variants_that_are_one_folder_somewhere_are_refused():
    """The same for variants."""
    variant = {"files": {"a": DIGEST}}
    refused_lock(lock_text({}, models={"m@1": {"variants": {"fp16": variant, "FP16": variant}}}))
    file = f"files = [{row('a')}]"
    text = f'schema = 1\n[models."m@1".variants.v]\n{file}\n[models."m@1".variants.V]\n{file}\n'
    refused_manifest(text.encode())


# ---- numbers, digests, JSON

BAD_SIZES = ["-1", "-0.0", "0.0", "1.0", "1e3", "true", "false", "null", '"1"', '""', "[]", "{}", "[1]", str(1 << 63)]
BAD_SIZES += [str((1 << 53) + 1), str(-(1 << 63)), "9" * 400, "1.5", "1e308"]
BAD_DIGESTS = [
    "", "sha256:", HEX, "sha256:" + HEX[:-1], "sha256:" + HEX + "0", "sha256:" + HEX.upper(), "SHA256:" + HEX,
    "sha256-" + HEX, "sha256:" + "g" * 64, "sha512:" + HEX, "md5:" + HEX[:32], " " + DIGEST, DIGEST + " ", DIGEST + "\n",
    "sha256: " + HEX, "sha256:" + "٣" * 64, "sha256:" + "é" * 64, "sha256:" + "\ud800" * 64,
    "sha256:../../../../etc/passwd", "blake3:" + HEX,
]  # fmt: skip
NOT_TEXT = [None, True, 0, 1.5, [], {}, [DIGEST], {"sha256": HEX}]


@pytest.mark.parametrize("text", BAD_SIZES)
def test_a_size_that_is_no_whole_number_in_range_is_refused(text):
    """Whole numbers from 0 to 2^53, and nothing that JSON or Python would take for one."""
    raw = lock_text({"a": DIGEST}, {DIGEST: {"size": "SIZE", "urls": []}}).replace(b'"SIZE"', text.encode())

    assert f"blobs['{DIGEST}'].size" in refused_lock(raw)


def test_a_size_may_be_0_or_2_to_the_53():
    """Both ends are in range."""
    blobs = {DIGEST: {"size": 1 << 53}, str(Digest.of(b"")): {"size": 0}}

    assert len(lockfile.parse(lock_text({"a": DIGEST}, blobs)).blobs) == 2


@pytest.mark.parametrize("text", BAD_DIGESTS, ids=shown)
def test_a_digest_that_does_not_parse_is_refused(text):
    """As a blob's name and as a file's."""
    assert f"blobs[{text[:80]!a}]" in refused_lock(lock_text({}, {text: {"size": 1, "urls": []}}))
    assert "models['m@1'].variants['v'].files['a']" in refused_lock(lock_text({"a": text}))


@pytest.mark.parametrize("value", NOT_TEXT, ids=shown)
def test_a_digest_that_is_no_text_is_refused(value):
    """A file's value is a digest."""
    assert refused_lock(lock_text({"a": value})) == ["models['m@1'].variants['v'].files['a']"]


def test_a_digest_without_a_blob_is_refused():
    """Its size would be unknown."""
    assert refused_lock(lock_text({"a": OTHER})) == ["models['m@1'].variants['v'].files['a']"]


def test_one_digest_with_two_sizes_is_refused():
    """In JSON that needs a key twice; in a manifest it needs two rows."""
    twice = f'"{DIGEST}": {{"size": 1}}, "{DIGEST}": {{"size": 2}}'
    refused_lock(lock_text({"a": DIGEST}, "BLOBS").replace(b'"BLOBS"', f"{{{twice}}}".encode()))

    with pytest.raises(ManifestValidationError, match="two sizes"):
        resolve(
            manifest.parse(manifest_text(row("a"), row("b", size="2")), TOML),
            None,
            registry=Registry(),
            prefetcher=NoPrefetcher(),
        )


def nested(depth: int, key: str = "x") -> bytes:
    """A lockfile of *depth* nested brackets."""
    inner = "[" * (depth - 1) + "]" * (depth - 1)
    return f'{{"lock_version": 1, "models": {{}}, "blobs": {{}}, "{key}": {inner}}}'.encode()


GOOD = lock_text({"a": DIGEST})
MALFORMED = {
    "empty": b"",
    "spaces": b"  \n",
    "cut": GOOD[:-10],
    "two documents": GOOD + GOOD,
    "something behind": GOOD + b"x",
    "NUL behind": GOOD + b"\0",
    "YAML": b"lock_version: 1\nmodels: {}\n",
    "TOML": b"lock_version = 1\n",
    "a comment": b"// hello\n" + GOOD,
    "single quotes": GOOD.replace(b'"', b"'"),
    "a trailing comma": b'{"lock_version": 1,}',
    "UTF-8 BOM": b"\xef\xbb\xbf" + GOOD,
    "UTF-16": GOOD.decode().encode("utf-16"),
    "UTF-16 without BOM": GOOD.decode().encode("utf-16-le"),
    "UTF-32": GOOD.decode().encode("utf-32"),
    "latin-1": lock_text({}).replace(b'"m@1"', b'"\xe9@1"'),
    "overlong UTF-8": GOOD.replace(b"m@1", b"\xc0\xafm@1"),
    "raw surrogate": GOOD.replace(b"m@1", b"\xed\xa0\x80m@1"),
    "git conflict": b"<<<<<<< HEAD\n" + GOOD,
    "null": b"null",
    "a list": b"[]",
    "a text": b'"x"',
    "a number": b"1",
    "NaN alone": b"NaN",
    "NaN": GOOD.replace(b"{", b'{"n": NaN, ', 1),
    "Infinity": GOOD.replace(b"{", b'{"n": Infinity, ', 1),
    "-Infinity": GOOD.replace(b"{", b'{"n": [-Infinity], ', 1),
    "1e999": GOOD.replace(b"{", b'{"n": {"m": 1e999}, ', 1),
    "-1e999": GOOD.replace(b"{", b'{"n": -1e999, ', 1),
    "NaN as size": GOOD.replace(b'"size": 1', b'"size": NaN'),
    "5,000 digits": GOOD.replace(b"{", b'{"n": ' + b"9" * 5_000 + b", ", 1),
    "5,000 digits as size": GOOD.replace(b'"size": 1', b'"size": ' + b"1" * 5_000),
    "5,000 digits as version": GOOD.replace(b'"lock_version": 1', b'"lock_version": ' + b"1" * 5_000),
    "the same key twice": b'{"lock_version": 1, "lock_version": 1, "models": {}, "blobs": {}}',
    "the same path twice": lock_text({"a": DIGEST}).replace(b'"a": ', f'"a": "{DIGEST}", "a": '.encode()),
    "the same path twice, escaped": lock_text({"a": DIGEST}).replace(b'"a": ', f'"\\u0061": "{DIGEST}", "a": '.encode()),
    "the same model twice": lock_text({}).replace(b'"m@1": ', b'"m@1": {}, "m@1": '),
    "a key twice in an unknown table": GOOD.replace(b"{", b'{"new": [{"k": 1, "k": 1}], ', 1),
    "nested 101": nested(101),
    "nested 102": nested(102),
    "nested 500": nested(500),
    "nested 100,000": nested(100_000),
    "nested 100,000, never closed": b"[" * 100_000,
    "objects nested 100,000": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "no version": b'{"models": {}, "blobs": {}}',
    "version 0": b'{"lock_version": 0, "models": {}, "blobs": {}}',
    "version -1": b'{"lock_version": -1, "models": {}, "blobs": {}}',
    "version 1.0": b'{"lock_version": 1.0, "models": {}, "blobs": {}}',
    "version true": b'{"lock_version": true, "models": {}, "blobs": {}}',
    "version text": b'{"lock_version": "1", "models": {}, "blobs": {}}',
    "version null": b'{"lock_version": null, "models": {}, "blobs": {}}',
    "no models": b'{"lock_version": 1, "blobs": {}}',
    "no blobs": b'{"lock_version": 1, "models": {}}',
    "models a list": b'{"lock_version": 1, "models": [], "blobs": {}}',
    "blobs null": b'{"lock_version": 1, "models": {}, "blobs": null}',
    "a model null": lock_text({}, models={"m@1": None}),
    "no variants": lock_text({}, models={"m@1": {}}),
    "variants a list": lock_text({}, models={"m@1": {"variants": ["v"]}}),
    "a variant null": lock_text({}, models={"m@1": {"variants": {"v": None}}}),
    "files a list": lock_text(["a"]),
    "no files": lock_text({}, models={"m@1": {"variants": {"v": {}}}}),
    "default unknown": lock_text({}, models={"m@1": {"variants": {}, "default": "v"}}),
    "default a list": lock_text({}, models={"m@1": {"variants": {}, "default": []}}),
    "pin 1": lock_text({}, models={"m@1": {"variants": {}, "pin": 1}}),
    "components a list": lock_text({}, models={"m@1": {"variants": {"v": {"files": {}, "components": []}}}}),
    "a component's path unknown": lock_text(
        {}, models={"m@1": {"variants": {"v": {"files": {}, "components": {"c": ["a"]}}}}}
    ),
    "optional unknown": lock_text({}, models={"m@1": {"variants": {"v": {"files": {}, "optional": ["c"]}}}}),
    "optional unhashable": lock_text({}, models={"m@1": {"variants": {"v": {"files": {}, "optional": [{}]}}}}),
    "a blob null": lock_text({}, {DIGEST: None}),
    "a blob without size": lock_text({}, {DIGEST: {"urls": []}}),
    "urls a text": lock_text({}, {DIGEST: {"size": 1, "urls": "mem://x"}}),
    "a url null": lock_text({}, {DIGEST: {"size": 1, "urls": [None]}}),
    "a url empty": lock_text({}, {DIGEST: {"size": 1, "urls": [""]}}),
    "a url with a newline": lock_text({}, {DIGEST: {"size": 1, "urls": ["http://h/a\r\nX: y"]}}),
    "a url with a surrogate": lock_text({}, {DIGEST: {"size": 1, "urls": ["\ud800"]}}),
    "a url with a password": lock_text({}, {DIGEST: {"size": 1, "urls": ["https://u:secret-canary@h/a"]}}),
    "a url with a user": lock_text({}, {DIGEST: {"size": 1, "urls": ["HTTPS://secret-canary@h/a"]}}),
    "a signed url": lock_text({}, {DIGEST: {"size": 1, "urls": ["https://h/a?X-Amz-Signature=secret-canary"]}}),
    "a url with a backslash host": lock_text({}, {DIGEST: {"size": 1, "urls": ["http://good\\@evil/a"]}}),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_lockfile_is_refused(name):
    """Whatever is wrong with it, the answer is one error that says so and gives away no secret."""
    with pytest.raises(LockfileInvalidError) as refused:
        lockfile.parse(MALFORMED[name])

    assert refused.value.details["problems"] and "canary" not in str(refused.value) + str(refused.value.details)


@pytest.mark.parametrize("depth", [50, 100])
def test_nesting_up_to_100_is_read(depth):
    """Only more than a hundred is too deep."""
    assert lockfile.parse(nested(depth)).models == {}


@pytest.mark.parametrize("urls", [["src/a"], []])
def test_a_blob_of_no_bytes_has_the_digest_of_no_bytes(urls, cli):
    """A size of 0 with another digest can never be verified: it is refused, or ends with an error, and never hangs."""
    (cli.folder / "src").mkdir()
    (cli.folder / "src" / "a").write_bytes(b"")
    (cli.folder / "models.lock").write_bytes(lock_text({"a": DIGEST}, {DIGEST: {"size": 0, "urls": urls}}))

    ran = cli.run("reconcile", "--json")

    assert ran.code == (2 if ran.json["error"]["code"] == "LOCKFILE_INVALID" else 5)


def test_the_digest_of_no_bytes_has_no_other_size(cli):
    """The same the other way round."""
    (cli.folder / "src").mkdir()
    (cli.folder / "src" / "a").write_bytes(b"xyz")
    empty = str(Digest.of(b""))
    (cli.folder / "models.lock").write_bytes(lock_text({"a": empty}, {empty: {"size": 3, "urls": ["src/a"]}}))

    ran = cli.run("reconcile", "--json")

    assert ran.code == 0  # the digest decides
    assert next((cli.root / "models").rglob("a")).read_bytes() == b""


# ---- made-up documents


@given(almost_lockfiles | json_values)
def test_no_document_gets_past_the_reader_but_as_a_lockfile_or_an_error(document):
    """Any JSON is read, or refused with an error of ours."""
    try:
        raw = json.dumps(document).encode()
    except ValueError:
        return
    lock_or_error(raw)


@given(st.binary(max_size=60) | st.text(max_size=60).map(lambda text: text.encode("utf-8", "surrogatepass")))
def test_no_bytes_get_past_the_reader_but_as_a_lockfile_or_an_error(raw):
    """Any bytes are read, or refused with an error of ours."""
    lock_or_error(raw)


@given(lockfiles(), st.data())
def test_no_damage_gets_past_the_reader_but_as_a_lockfile_or_an_error(lock, data):
    """A good lockfile with some bytes of it replaced is read, or refused with an error of ours."""
    raw = bytearray(lock.format().encode())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(raw) - 1))
        cut = data.draw(st.integers(0, 8))
        raw[at : at + cut] = data.draw(
            st.sampled_from([b"", b'"', b"\\", b"{", b"}", b"[", b",", b"1e999", b"\xff", b"..", b"/"])
        )
    lock_or_error(bytes(raw))


def lock_or_error(raw: bytes) -> None:
    try:
        lock = lockfile.parse(raw)
    except ModelstowError as error:
        assert error.code in ("LOCKFILE_INVALID", "SCHEMA_VERSION_MISMATCH")
        str(error).encode()
        return
    assert lockfile.parse(lock.format().encode()).blobs.keys() == lock.blobs.keys()


@given(toml_texts | st.text(max_size=40) | st.permutations(TOML_LINES).map("\n".join))
def test_no_text_gets_past_the_reader_but_as_a_manifest_or_an_error(text):
    """Any text is read as a manifest, or refused with an error of ours."""
    manifest_or_error(text.encode("utf-8", "surrogatepass"))


@given(st.binary(max_size=60))
def test_no_bytes_get_past_the_reader_but_as_a_manifest_or_an_error(raw):
    """Any bytes are read as a manifest, or refused with an error of ours."""
    manifest_or_error(raw)


def manifest_or_error(raw: bytes) -> None:
    try:
        manifest.parse(raw, TOML)
    except ModelstowError as error:
        assert error.code in ("MANIFEST_VALIDATION_ERROR", "SCHEMA_VERSION_MISMATCH")
        str(error).encode()


HEAD = b'schema = 1\n[models."m"]\nversion = "1"\nsources = ["src"]\n[models."m".variants.v]\n'
MALFORMED_MANIFESTS = {
    "invalid UTF-8": b"schema = 1 # \xff\n",
    "raw surrogate": b'schema = 1\na = "\xed\xa0\x80"\n',
    "UTF-8 BOM": b"\xef\xbb\xbfschema = 1\n",
    "NUL": b"schema = 1\0\n",
    "the same key twice": b"schema = 1\nschema = 1\n",
    "the same table twice": HEAD + HEAD[11:],
    "surrogate escape": HEAD + b'include = ["\\ud800"]\n',
    "cut": HEAD[:-3],
    "nested 100,000": HEAD + b"files = " + b"[" * 100_000,
    "inline tables nested 5,000": HEAD + b"files = " + b"{ a = " * 5_000,
    "a key of 1,500 parts": HEAD + b"include" + b".a" * 1_500 + b" = 1\n",
    "a value of 1,500 tables": HEAD + b"files = [{ path" + b".a" * 1_500 + b" = 1 }]\n",
    "5,000 digits": HEAD + b"files = [{ path = 'a', sha256 = '" + HEX.encode() + b"', size = " + b"9" * 5_000 + b" }]\n",
    "5,000 hex digits": HEAD
    + b"files = [{ path = 'a', sha256 = '"
    + HEX.encode()
    + b"', size = 0x"
    + b"f" * 5_000
    + b" }]\n",
    "5,000 hex digits for a text": HEAD + b"index = 0x" + b"f" * 5_000 + b"\n",
    "5,000 hex digits in a list": HEAD + b"include = [0x" + b"f" * 5_000 + b"]\n",
    "a date": HEAD + b"index = 1979-05-27T07:32:00Z\n",
    "nan": HEAD + b"files = [{ path = 'a', sha256 = 'x', size = nan }]\n",
    "JSON": b'{"schema": 1}',
}


@pytest.mark.parametrize("name", MALFORMED_MANIFESTS)
def test_a_malformed_manifest_is_refused(name):
    """The same for the file that people write."""
    refused_manifest(MALFORMED_MANIFESTS[name])


def test_a_schema_of_5000_hex_digits_is_refused():
    """A version that Python will not even print."""
    with pytest.raises((ManifestValidationError, SchemaVersionError)):
        manifest.parse(b"schema = 0x" + b"f" * 5_000, TOML)


# ---- hostile listings


class NoPrefetcher:
    """Nothing may be pulled."""

    def pull(self, locator: str):
        raise AssertionError(f"{locator} was asked for")

    def read(self, digest):
        raise AssertionError("something was read")


class Lister:
    """A source that lists what it likes and must not be opened."""

    network = True

    def __init__(self, *paths: str, size: int = 1, sha256: str = HEX) -> None:
        self.files = tuple(Listed(path=path, size=size, sha256=sha256) for path in paths)

    def listing(self, locator: str) -> Listing:
        return Listing(locator=locator, files=self.files)

    def open(self, locator: str, *, start: int = 0, stop: int | None = None):
        raise AssertionError(f"{locator} was opened")

    def size(self, locator: str):
        raise AssertionError(f"{locator} was asked for its size")

    def origin(self, locator: str) -> str:
        return locator


def resolved(lister: Lister):
    text = HEAD.replace(b'"src"', b'"http://h.example/m"') + b'include = ["**", "/*", "*"]\n'
    registry = Registry({"http": lambda: lister})
    return resolve(manifest.parse(text, TOML), None, registry=registry, prefetcher=NoPrefetcher())


def test_a_hostile_path_in_a_listing_never_gets_into_a_lockfile():
    """A listed path is refused by the same rules, before anything is requested by it."""

    def check(path: str) -> None:
        try:
            lock = resolved(Lister("good", path))
        except ManifestValidationError as error:
            str(error).encode()
        else:
            assert set(lock.models["m@1"].variants["v"].files) == {"good"}

    assert_no_miss(BAD_PATHS, check)


@pytest.mark.parametrize(("one", "other"), COLLISIONS[3:], ids=shown)
def test_a_listing_with_paths_that_are_one_somewhere_is_refused(one, other):
    """Colliding paths are no less hostile for coming from a source."""
    with pytest.raises(ManifestValidationError):
        resolved(Lister(one, other))


@pytest.mark.parametrize("digest", ["", "x", HEX[:-1], HEX + "0", "../" * 21 + "x", "g" * 64])
def test_a_digest_in_a_listing_that_is_none_never_gets_into_a_lockfile(digest):
    """What a listing claims is refused before it becomes a lockfile that no reader accepts."""
    with pytest.raises(ModelstowError):
        resolved(Lister("good", sha256=digest))


@pytest.mark.parametrize("size", [-1, (1 << 53) + 1, 1 << 64])
def test_a_size_in_a_listing_that_is_none_never_gets_into_a_lockfile(size):
    """The same for sizes."""
    with pytest.raises(ModelstowError):
        resolved(Lister("good", size=size))


def test_no_hostile_name_that_a_hub_lists_gets_into_a_lockfile():
    """Nor is a file asked for by it, be it one that the listing names by sha256 or one that has to be read (L12)."""
    text = HEAD.replace(b'"src"', b'"hf://org/name"') + b'include = ["**", "/*", "*"]\n'
    with Hub() as hub:
        hub.add("org/name", {"good": b"x"}, lfs=("good",))
        registry = Registry({"hf": lambda: HubSource({"HF_ENDPOINT": hub.url})})
        for number, path in enumerate(BAD_PATHS):
            row = {"type": "file", "path": path, "size": 1, "oid": "0" * 40}
            row |= {"lfs": {"oid": HEX, "size": 1}} if number % 2 else {}
            hub.edit = lambda good, row=row: [*good, row]
            try:
                lock = resolve(manifest.parse(text, TOML), None, registry=registry, prefetcher=NoPrefetcher())
            except ManifestValidationError as error:
                str(error).encode()
            else:
                assert set(lock.models["m@1"].variants["v"].files) == {"good"}
        assert len(hub.requests) == 2 * len(BAD_PATHS)


@pytest.mark.parametrize("lfs", [{"oid": "x", "size": 1}, {"oid": HEX[:-1], "size": 1}, {"oid": HEX, "size": -1}])
def test_an_invalid_digest_or_size_of_a_hub_is_reported_with_its_file(lfs):
    """It is the model's table that has the problem; the hub's words are shown."""
    text = HEAD.replace(b'"src"', b'"hf://org/name"')
    with Hub() as hub:
        hub.add("org/name", {"good": b"x"})
        hub.edit = lambda good: [{"type": "file", "path": "a.bin", "size": 1, "oid": "0" * 40, "lfs": lfs}]
        registry = Registry({"hf": lambda: HubSource({"HF_ENDPOINT": hub.url})})
        with pytest.raises(ManifestValidationError, match=r"the source lists 'a\.bin' with"):
            resolve(manifest.parse(text, TOML), None, registry=registry, prefetcher=NoPrefetcher())


# ---- through the real command line

SAMPLE = [
    "empty", "cut", "UTF-8 BOM", "UTF-16", "latin-1", "null", "NaN", "1e999", "5,000 digits as size", "the same key twice",
    "nested 102", "nested 100,000", "no version", "version true", "models a list", "a blob null", "a url with a newline",
    "a url with a password", "a signed url",
]  # fmt: skip
THROUGH = {
    **{name: MALFORMED[name] for name in SAMPLE},
    "up and out": lock_text({"../../outside": DIGEST}),
    "absolute": lock_text({"/outside": DIGEST}),
    "a surrogate": lock_text({"a\ud800": DIGEST}),
    "NUL in a path": lock_text({"a\0b": DIGEST}),
    "bidi": lock_text({"a\u202eb": DIGEST}),
    "a device": lock_text({"nul.txt": DIGEST}),
    "a later version": b'{"lock_version": 2}',
}


@pytest.mark.parametrize("name", THROUGH)
def test_the_command_line_refuses_a_hostile_lockfile_and_creates_nothing(name, cli):
    """Exit code 2, one JSON document, no traceback, no secret, no store."""
    (cli.folder / "models.lock").write_bytes(THROUGH[name])

    ran = cli.run("reconcile", "--json")

    assert ran.code == 2 and ran.out.count("\n") == 1
    assert ran.json["ok"] is False and ran.json["schema"] == 1
    assert set(ran.json["error"]) == {"code", "message", "hint", "details"}
    expected = "SCHEMA_VERSION_MISMATCH" if name == "a later version" else "LOCKFILE_INVALID"
    assert ran.json["error"]["code"] == expected and ran.json["error"]["hint"]
    assert "Traceback" not in ran.err and "canary" not in ran.out + ran.err and ran.err.startswith("error: ")
    assert sorted(path.name for path in cli.folder.iterdir()) == ["models.lock"]


def test_the_command_line_reports_all_problems_with_their_places(cli):
    """One run reports everything that is wrong."""
    files = {"../a": DIGEST, "b": "sha256:x", "c": DIGEST, "C": DIGEST}
    (cli.folder / "models.lock").write_bytes(lock_text(files, {DIGEST: {"size": 1}, OTHER: {"size": -1}}))

    ran = cli.run("reconcile", "--json")

    problems = ran.json["error"]["details"]["problems"]
    places = {problem["place"] for problem in problems}
    here = "models['m@1'].variants['v'].files"
    assert ran.code == 2
    assert {f"{here}['../a']", f"{here}['b']", f"{here}['C']", f"blobs['{OTHER}'].size"} <= places
    assert all(problem["message"] and problem["place"] in ran.err for problem in problems)


def test_bytes_that_no_disk_holds_are_refused_before_any_is_fetched(cli):
    """Sizes that add up to more than the disk has are NO_SPACE, with how much is needed and how much is there."""
    blobs = {DIGEST: {"size": 1 << 53, "urls": ["src/x"]}, OTHER: {"size": 1 << 53, "urls": ["src/y"]}}
    (cli.folder / "models.lock").write_bytes(lock_text({"a": DIGEST, "b": OTHER}, blobs))

    ran = cli.run("reconcile", "--json")

    details = ran.json["error"]["details"]
    assert ran.code == 6 and ran.json["error"]["code"] == "NO_SPACE"
    assert details["bytes_needed"] >= 1 << 54 and 0 < details["bytes_available"] < 1 << 54 and details["path"]


# ---- manifests through and through

HERE = 'models."m".variants.v'
MODEL = 'schema = 1\n[models."m"]\nversion = "1"\nsources = ["src"]\n'
VARIANT = MODEL + '[models."m".variants.v]\n'
GOOD_ROW = f'files = [{{ path = "a", size = 1, sha256 = "{HEX}" }}]\n'
BAD_VALUES = [
    ("[models]\n", "schema"),
    ("schema = true\n", "schema"),
    ('schema = "1"\n', "schema"),
    ("schema = 1\nmodel = {}\n", "model"),
    ("schema = 1\nmodels = []\n", "models"),
    ("schema = 1\n[models]\nm = 1\n", 'models."m"'),
    ('schema = 1\n[models."m"]\n', 'models."m".version'),
    ('schema = 1\n[models."m"]\nversion = 1\n', 'models."m".version'),
    ('schema = 1\n[models."m"]\nversion = "1"\n', 'models."m".variants'),
    (VARIANT.replace('version = "1"', 'version = "a/b"'), 'models."m"'),
    (VARIANT.replace('"m"', '"m@2"'), 'models."m@2".version'),
    (VARIANT.replace('"m"', '"../m"'), 'models."../m"'),
    (VARIANT.replace('"m"', '"CON"'), 'models."CON"'),
    (VARIANT.replace('"m"', '"a/b/c"'), 'models."a/b/c"'),
    (MODEL + 'source = ["x"]\n[models."m".variants.v]\n', 'models."m".source'),
    (MODEL + 'default = "w"\n[models."m".variants.v]\n', 'models."m".default'),
    (MODEL + "default = 1\n" + '[models."m".variants.v]\n', 'models."m".default'),
    (MODEL + "pin = 1\n" + '[models."m".variants.v]\n', 'models."m".pin'),
    (MODEL + 'pin = "true"\n' + '[models."m".variants.v]\n', 'models."m".pin'),
    (VARIANT.replace('["src"]', '"src"'), 'models."m".sources'),
    (VARIANT.replace('["src"]', '["src", 1]'), 'models."m".sources'),
    (VARIANT.replace('"src"', '"src", ""'), 'models."m".sources[1]'),
    (VARIANT.replace('"src"', '"ftp://h/x"'), 'models."m".sources[0]'),
    (VARIANT.replace('"src"', '"a\\nb"'), 'models."m".sources[0]'),
    (VARIANT.replace('"src"', '"https://u:secret-canary@h/x"'), 'models."m".sources[0]'),
    (VARIANT.replace('"src"', '"https://secret-canary@h/x"'), 'models."m".sources[0]'),
    (VARIANT.replace('"src"', '"s3://key:secret-canary@bucket/x"'), 'models."m".sources[0]'),
    (VARIANT.replace('"src"', '"https://h/x?X-Amz-Signature=secret-canary"'), 'models."m".sources[0]'),
    (VARIANT.replace('"src"', '"https://h?token=secret-canary"'), 'models."m".sources[0]'),
    (VARIANT.replace('"src"', '"s3://bucket/x?X-Amz-Signature=secret-canary"'), 'models."m".sources[0]'),
    (VARIANT.replace('"m".variants.v', '"m".variants."a b"'), 'models."m".variants."a b"'),
    (MODEL + '[models."m".variants]\nv = 1\n', HERE),
    (VARIANT + "includes = []\n", HERE + ".includes"),
    (VARIANT + 'include = "*"\n', HERE + ".include"),
    (VARIANT + "include = [1]\n", HERE + ".include"),
    (VARIANT + 'include = ["*", ""]\n', HERE + ".include[1]"),
    (VARIANT + 'exclude = ["a\\\\b"]\n', HERE + ".exclude[0]"),
    (VARIANT + "exclude = {}\n", HERE + ".exclude"),
    (VARIANT + 'rename = ["a"]\n', HERE + ".rename"),
    (VARIANT + "rename = { a = 1 }\n", HERE + ".rename.a"),
    (VARIANT + 'rename = { a = "../b" }\n', HERE + ".rename.a"),
    (VARIANT + 'rename = { "a.b" = "/b" }\n', HERE + '.rename."a.b"'),
    (VARIANT + "index = []\n", HERE + ".index"),
    (VARIANT + "extends = 1\n", HERE + ".extends"),
    (VARIANT + 'extends = ["m"]\n', HERE + ".extends[0]"),
    (VARIANT + 'extends = ["x@1#v"]\n', HERE + ".extends"),
    (VARIANT + 'extends = ["m@1#v"]\n', HERE + ".extends"),
    (VARIANT + "components = []\n", HERE + ".components"),
    (VARIANT + "components = { vae = 1 }\n", HERE + ".components.vae"),
    (VARIANT + 'components = { "a/b" = ["x"] }\n', HERE + '.components."a/b"'),
    (VARIANT + 'components = { vae = [""] }\n', HERE + ".components.vae[0]"),
    (VARIANT + 'optional = ["vae"]\n', HERE + ".optional[0]"),
    (VARIANT + "optional = 1\n", HERE + ".optional"),
    (VARIANT + "files = 1\n", HERE + ".files"),
    (VARIANT + "files = [1]\n", HERE + ".files[0]"),
    (VARIANT + "files = [{}]\n", HERE + ".files[0].path"),
    (VARIANT + "files = [{}]\n", HERE + ".files[0].size"),
    (VARIANT + "files = [{}]\n", HERE + ".files[0].sha256"),
    (VARIANT + GOOD_ROW.replace('"a"', "1"), HERE + ".files[0].path"),
    (VARIANT + GOOD_ROW.replace("size = 1", "size = -1"), HERE + ".files[0].size"),
    (VARIANT + GOOD_ROW.replace("size = 1", "size = true"), HERE + ".files[0].size"),
    (VARIANT + GOOD_ROW.replace("size = 1", "size = 1.0"), HERE + ".files[0].size"),
    (VARIANT + GOOD_ROW.replace("size = 1", "size = inf"), HERE + ".files[0].size"),
    (VARIANT + GOOD_ROW.replace("size = 1", 'size = "1"'), HERE + ".files[0].size"),
    (VARIANT + GOOD_ROW.replace("size = 1", f"size = {1 << 63}"), HERE + ".files[0].size"),
    (VARIANT + GOOD_ROW.replace("size = 1", f"size = {(1 << 53) + 1}"), HERE + ".files[0].size"),
    (VARIANT + GOOD_ROW.replace(HEX, HEX[:-1]), HERE + ".files[0].sha256"),
    (VARIANT + GOOD_ROW.replace(HEX, "g" * 64), HERE + ".files[0].sha256"),
    (VARIANT + GOOD_ROW.replace(HEX, ""), HERE + ".files[0].sha256"),
    (VARIANT + GOOD_ROW.replace(f'"{HEX}"', "1"), HERE + ".files[0].sha256"),
    (VARIANT + GOOD_ROW.replace("size", 'from = "../x", size'), HERE + ".files[0].from"),
    (VARIANT + GOOD_ROW.replace("size", "from = 1, size"), HERE + ".files[0].from"),
    (VARIANT + GOOD_ROW.replace("size", "url = 'x', size"), HERE + ".files[0].url"),
    (MODEL.replace('sources = ["src"]\n', "") + '[models."m".variants.v]\n', HERE + ".include"),
    (VARIANT + "[mirrors]\nurls = 1\n", "mirrors.urls"),
    (VARIANT + "[mirrors]\nurl = 1\n", "mirrors.url"),
    (VARIANT + '[mirrors]\nurls = ["https://u:secret-canary@h/"]\n', "mirrors.urls[0]"),
    (VARIANT + '[mirrors]\nurls = ["https://h/?sig=secret-canary"]\n', "mirrors.urls[0]"),
]


@pytest.mark.parametrize(("text", "place"), BAD_VALUES, ids=[f"{n}-{p}" for n, (_, p) in enumerate(BAD_VALUES)])
def test_a_bad_value_in_a_manifest_is_reported_with_its_place(text, place):
    """Every key and every value of the contract has its own place in the message."""
    with pytest.raises(ManifestValidationError) as refused:
        manifest.parse(text.encode(), TOML)

    assert place in [problem["place"] for problem in refused.value.details["problems"]]
    assert f"{place}: " in str(refused.value) and "canary" not in str(refused.value) + str(refused.value.details)


def test_the_place_of_a_listed_file_is_written_as_the_contract_shows():
    """The path of the fourth file of variant fp16 of minilm."""
    rows = ", ".join([row("a"), row("b"), row("c"), row("../d")])
    text = f'schema = 1\n[models."minilm"]\nversion = "1"\n[models."minilm".variants.fp16]\nfiles = [{rows}]\n'

    with pytest.raises(ManifestValidationError, match=r'models\."minilm"\.variants\.fp16\.files\[3\]\.path: '):
        manifest.parse(text.encode(), TOML)


@pytest.mark.parametrize("source", ["https://u:p@h/x", "https://h/x?Signature=abc"])
def test_a_locator_with_a_secret_is_refused_with_a_hint(source, cli):
    """The hint says what to do instead; the command line exits with 2."""
    (cli.folder / "models.toml").write_text(VARIANT.replace("src", source))

    ran = cli.run("lock", "--json")

    error = ran.json["error"]
    assert ran.code == 2 and error["code"] == "MANIFEST_VALIDATION_ERROR"
    assert "without" in error["hint"] + error["message"]
    assert source not in ran.out + ran.err
    assert not (cli.folder / "models.lock").exists() and not cli.root.exists()


def test_all_problems_of_a_manifest_are_reported_together(cli):
    """Exit code 2, each problem with its place, and nothing is written."""
    bad = (
        VARIANT + 'include = [""]\nincludes = 1\nfiles = [{ path = "..", size = true, sha256 = "x" }]\n[mirrors]\nurl = 1\n'
    )
    (cli.folder / "models.toml").write_text(bad)

    ran = cli.run("lock", "--json")

    places = {problem["place"] for problem in ran.json["error"]["details"]["problems"]}
    assert ran.code == 2 and ran.json["error"]["code"] == "MANIFEST_VALIDATION_ERROR"
    assert {f"{HERE}.include[0]", f"{HERE}.includes", f"{HERE}.files[0].size", "mirrors.url"} <= places
    assert all(place in ran.err for place in places) and "Traceback" not in ran.err
    assert sorted(path.name for path in cli.folder.iterdir()) == ["models.toml"]


def test_every_problem_of_one_listed_file_is_reported():
    """A bad size does not hide a bad path or a bad digest."""
    raw = manifest_text('{ path = "../a", size = true, sha256 = "x" }')

    places = refused_manifest(raw)

    assert {f"{HERE}.files[0].path", f"{HERE}.files[0].size", f"{HERE}.files[0].sha256"} <= set(places)


def test_a_later_schema_is_refused_by_name(cli):
    """The manifest's own version, through the command line."""
    (cli.folder / "models.toml").write_text("schema = 2\n")

    ran = cli.run("lock", "--json")

    assert ran.code == 2 and ran.json["error"]["code"] == "SCHEMA_VERSION_MISMATCH"
    assert ran.json["error"]["details"] == {"found_version": 2, "supported_versions": [1]}


def test_an_upper_case_sha256_is_read_and_written_lower(cli):
    """People paste what their tools print."""
    (cli.folder / "models.toml").write_bytes(manifest_text(row("a", sha256=f'"{HEX.upper()}"')))

    cli.ok("lock")

    assert set(json.loads((cli.folder / "models.lock").read_text())["blobs"]) == {DIGEST}
