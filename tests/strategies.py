"""Hypothesis strategies of all property tests: small, colliding worlds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from hypothesis import strategies as st

from modelstow.cas import Digest
from modelstow.reconcile.desired.lockfile import LockedBlob, LockedModel, LockedVariant, Lockfile

# ---- lockfiles

DIGESTS = tuple(Digest.of(bytes([n])) for n in range(5))
PATHS = ("a", "B", "b.c", "d/e", "d/F", "d é/ü ~#%.bin", "été", "𝔘", "\uff5e", "_", ".hidden", "z" * 60)
"""Good paths that are good together; their order by code point is not the order of UTF-16 or of any language."""
LOCATORS = ("mem://o/x", "https://h.example/a b", "../near by/x", "s3://b/é", "hf://o/n@main/x")

digests = st.sampled_from(DIGESTS)

# ---- paths

_GOOD_SEGMENTS = (
    "a",
    "A",
    "b",
    "a b",
    ".a",
    "..a",
    "~",
    "é",
    "e\u0301",
    "É",
    "ß",
    "SS",
    "ss",
    "ﬁ",
    "FI",
    "K",
    "\u212a",
    "con_",
)
good_segments = st.sampled_from(_GOOD_SEGMENTS) | st.text("aAéK\u0301._-", max_size=4).map(lambda text: f"{text}x")
good_paths = st.lists(good_segments, min_size=1, max_size=4).map("/".join)
"""Paths that are good each by itself; many of them are one file where case or Unicode form does not count."""
BAD_SEGMENTS = (
    "",
    ".",
    "..",
    "a.",
    "a ",
    " ",
    "x" * 256,
    "é" * 128,
    "CON",
    "nul.txt",
    "Aux",
    "com1.tar.gz",
    "LPT³",
    "conin$",
)
BAD_CHARACTERS = tuple('\\<>:"|?*\0\n\x1f\x7f\x85\u061c\u200e\u202e\u2028\u2029\u2066\ud800\udfff')
path_texts = (
    good_paths | st.lists(good_segments | st.sampled_from(BAD_SEGMENTS), max_size=5).map("/".join) | st.text(max_size=9)
)
"""Good and bad paths, and any text."""

# ---- lockfile parts

locked_blobs = st.builds(
    LockedBlob,
    size=st.sampled_from([0, 1, 612, 1 << 53]),
    urls=st.lists(st.sampled_from(LOCATORS), unique=True, max_size=3).map(tuple),
)


@st.composite
def locked_variants(draw: st.DrawFn) -> LockedVariant:
    files = draw(st.dictionaries(st.sampled_from(PATHS), digests, min_size=1, max_size=5))
    parts = st.lists(st.sampled_from(sorted(files)), unique=True, min_size=1).map(sorted).map(tuple)
    components = draw(st.dictionaries(st.sampled_from(["vae", "unet", "Te"]), parts, max_size=2))
    optional = draw(st.lists(st.sampled_from(sorted(components)), unique=True)) if components else []
    return LockedVariant(files=files, components=components, optional=tuple(sorted(optional)))


@st.composite
def locked_models(draw: st.DrawFn) -> LockedModel:
    variants = draw(st.dictionaries(st.sampled_from(["fp16", "fp32", "Q4"]), locked_variants(), min_size=1))
    return LockedModel(
        variants=variants,
        default=draw(st.sampled_from([None, *sorted(variants)])),
        entry=draw(st.sampled_from(["", "sha256:" + "1" * 64])),
        pin=draw(st.booleans()),
    )


@st.composite
def lockfiles(draw: st.DrawFn) -> Lockfile:
    keys = st.sampled_from(["m@1", "m@1.0.0+cu12", "wan/t2v-a14b@2.2.0", "Z@0"])
    return Lockfile(
        manifest=draw(st.sampled_from(["", "sha256:" + "0" * 64])),
        models=draw(st.dictionaries(keys, locked_models(), max_size=3)),
        blobs={digest: draw(locked_blobs) for digest in DIGESTS},
    )


# ---- made-up documents

_KEYS = ["lock_version", "manifest", "models", "blobs", "variants", "files", "default", "components", "optional", "pin"]
_KEYS += ["size", "urls", "entry", "m@1", "m", "v", "a", "..", "", "\ud800", str(DIGESTS[0]), str(DIGESTS[1])]
_scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 3),
    st.integers(),
    st.floats(),
    st.sampled_from(_KEYS),
    st.text(max_size=5),
)
json_values = st.recursive(
    _scalars,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.sampled_from(_KEYS), inner, max_size=4)),
    max_leaves=15,
)
almost_lockfiles = st.fixed_dictionaries(
    {"lock_version": st.sampled_from([1, 1, 1, 0, 2, True, 1.0])},
    optional={
        "manifest": json_values,
        "models": st.dictionaries(
            st.sampled_from(["m@1", "M@1", "m", "x@1"]),
            st.fixed_dictionaries({"variants": st.dictionaries(st.sampled_from("vV"), json_values, max_size=2)})
            | json_values,
            max_size=2,
        )
        | json_values,
        "blobs": st.dictionaries(
            st.sampled_from([*map(str, DIGESTS), "sha256:x"]),
            st.fixed_dictionaries({"size": json_values, "urls": json_values}) | json_values,
            max_size=2,
        )
        | json_values,
    },
)

TOML_LINES = (
    "schema = 1",
    "schema = 2",
    "schema = true",
    '[models."m"]',
    '[models."m@1"]',
    "[models.m.variants.v]",
    '[models."m".variants.w]',
    'version = "1"',
    "version = 1",
    'sources = ["src"]',
    "sources = [1]",
    'sources = "x"',
    'default = "v"',
    "pin = 1",
    'include = ["*.bin"]',
    'include = [""]',
    'extends = ["m@1#v"]',
    'extends = ["x"]',
    'files = [{ path = "a", size = 1, sha256 = "' + "0" * 64 + '" }]',
    'files = [{ path = "../a", size = -1, sha256 = "0" }]',
    "files = [1, {}]",
    'components = { vae = ["vae/**"] }',
    "components = { vae = 1 }",
    'optional = ["vae"]',
    'rename = { "a" = "b" }',
    'rename = { "a" = 1 }',
    'index = "i.json"',
    "[mirrors]",
    'urls = ["https://u:p@h/"]',
    "[policy]",
    "[[models]]",
    "models = 1",
    "when = 1979-05-27",
    "a.b.c = nan",
)
toml_texts = st.lists(st.sampled_from(TOML_LINES), max_size=12).map("\n".join)

# ---- transfers


@dataclass(frozen=True)
class Reply:
    """What a simulated source does with one request: it sends *pieces* whole pieces and *part* MiB of the next one, then
    ends in one of these ways."""

    pieces: int = 99
    then: str = ""  # "" served the whole request, "cut", "throttle", "gone"
    retry_after: float | None = None
    part: int = 0


@dataclass(frozen=True)
class Sim:
    """A simulated source: what it does with its first requests (then it serves), and the pieces that are corrupt."""

    replies: tuple[Reply, ...] = ()
    corrupt: frozenset[int] = frozenset()
    corrupt_for: int = 1_000  # requests after which it sends the right bytes
    recently_failed: bool = False
    piece_s: float = 0.01  # seconds that it takes for a piece; from 60 on it counts as stalled


_retry_after = st.one_of(st.none(), st.sampled_from([-5.0, 0.0, 7.0, 1e9, float("nan"), float("inf")]))
endings = st.sampled_from(["cut", "throttle", "gone"])
replies = st.builds(Reply, pieces=st.integers(0, 2), then=endings, retry_after=_retry_after, part=st.integers(0, 7))
_speeds = st.sampled_from([0.001, 0.01, 1.0, 70.0])
flaky = st.builds(Sim, replies=st.lists(replies, max_size=12).map(tuple), recently_failed=st.booleans(), piece_s=_speeds)
corrupt_sources = st.builds(
    Sim,
    replies=st.lists(replies, max_size=4).map(tuple),
    corrupt=st.frozensets(st.integers(0, 4), min_size=1),
    corrupt_for=st.sampled_from([1, 2, 1_000]),
    recently_failed=st.booleans(),
    piece_s=_speeds,
)
steady = st.builds(Sim, recently_failed=st.booleans(), piece_s=st.sampled_from([0.001, 0.01, 1.0]))


@st.composite
def crowds(draw: st.DrawFn, *, with_steady: bool = False) -> Mapping[str, Sim]:
    """Up to four sources by locator, in any order; with at least one that is correct and never fails, if wanted."""
    rows = draw(st.lists(st.one_of(flaky, corrupt_sources, steady), min_size=0 if with_steady else 1, max_size=3))
    if with_steady:
        rows.insert(draw(st.integers(0, len(rows))), draw(steady))
    return {f"mem://{number}": row for number, row in enumerate(rows)}
