"""The manifest, ``models.toml``: read once and checked whole; every problem is reported with its place."""

from __future__ import annotations

import hashlib
import json
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from modelstow.cas import Digest

from ..errors import ManifestValidationError, Problem, SchemaVersionError
from . import validation
from .locators import check_source, normalize
from .lockfile import MOST_SIZE

SCHEMA = 1
_MOST_BYTES = 64 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class ListedFile:
    """A file that the manifest lists with size and sha256. ``source_path`` is its path at the source."""

    path: str
    source_path: str
    size: int  # bytes
    digest: Digest


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """One variant: globs over a source's listing, listed files, other variants that it extends, or several of these."""

    include: tuple[str, ...] = ()  # gitignore-style; empty where all files are listed or extended
    exclude: tuple[str, ...] = ()
    rename: Mapping[str, str] = field(default_factory=dict)  # path at the source -> path in the tree
    files: tuple[ListedFile, ...] = ()
    index: str | None = None  # the file that names the shards to take
    extends: tuple[str, ...] = ()  # name@version#variant
    components: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # name -> globs over paths in the tree
    optional: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """One ``name@version``. ``entry`` is a digest of the meaning of its table."""

    id: validation.ModelId
    key: str  # as the manifest writes it: with or without the version
    sources: tuple[str, ...]
    variants: Mapping[str, Variant]
    default: str | None
    pin: bool
    entry: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """A whole manifest. ``meaning`` is a digest of everything that a lockfile depends on."""

    path: Path
    models: Mapping[str, Model]  # by name@version
    mirrors: tuple[str, ...]
    meaning: str


def read(path: Path) -> Manifest:
    """The manifest in a file. Raises ManifestValidationError with every problem, SchemaVersionError, OSError."""
    with open(path, "rb") as file:
        return parse(file.read(_MOST_BYTES + 1), path)


def parse(raw: bytes, path: Path) -> Manifest:
    """The manifest in a text. Raises ManifestValidationError with every problem, SchemaVersionError."""

    def refuse(what: str) -> ManifestValidationError:
        return ManifestValidationError(str(path), [Problem("", what)])

    if len(raw) > _MOST_BYTES:
        raise refuse(f"it is larger than {_MOST_BYTES:,} bytes")
    try:
        document = tomllib.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise refuse(f"it is not UTF-8 (byte {error.start:,})") from error
    except (tomllib.TOMLDecodeError, RecursionError, ValueError) as error:
        raise refuse(f"it is not TOML: {str(error) or 'nested too deep'}") from error
    schema = document.get("schema")
    if type(schema) is int and schema != SCHEMA:
        raise SchemaVersionError(
            f"{path} has schema {_excerpt(schema)}; this modelstow reads {SCHEMA}",
            hint=f"upgrade modelstow, or write the manifest for schema = {SCHEMA}",
            found_version=schema if abs(schema) < 1 << 53 else _excerpt(schema),
            supported_versions=[SCHEMA],
        )
    problems: list[Problem] = []
    manifest = _manifest(_TableReader(document, "", problems), path)
    if problems:
        raise ManifestValidationError(str(path), problems)
    return manifest


class _TableReader:
    """A reader of one TOML table: takes keys one by one, collects problems, and reports the keys that are left over."""

    def __init__(self, values: Mapping[str, Any], place: str, problems: list[Problem]) -> None:
        self._values, self.place, self.problems = dict(values), place, problems

    def remaining(self) -> list[str]:
        """The keys that were not taken yet."""
        return list(self._values)

    def place_of(self, key: str) -> str:
        """The place of a key for a message: its dotted path."""
        # A model's key is always quoted, as users write it; others only where TOML requires it.
        bare = self.place != "models" and re.fullmatch(r"[A-Za-z0-9_-]+(\[\d+\](\.[a-z0-9]+)?)?", key)
        text = key if bare else json.dumps(key)
        return f"{self.place}.{text}" if self.place else text

    def report(self, key: str, what: str) -> None:
        """Add a problem at a key."""
        self.problems.append(Problem(self.place_of(key), what))

    def take(self, key: str, kind: type, default: Any, what: str) -> Any:
        """The value of a key; *default* where it is missing or, which is a problem, of another type."""
        if key not in self._values:
            return default
        value = self._values.pop(key)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            self.report(key, f"expected {what}, got {_excerpt(value)}")
            return default
        return value

    def text(self, key: str, default: str | None = None) -> str | None:
        """The string of a key."""
        value: str | None = self.take(key, str, default, "a string")
        return value

    def flag(self, key: str) -> bool:
        """The boolean of a key; False where it is missing."""
        return bool(self.take(key, bool, False, "true or false"))

    def texts(self, key: str, default: tuple[str, ...] = ()) -> tuple[str, ...]:
        """The list of strings of a key; elements of other types are problems and left out."""
        values = self.take(key, list, None, "a list of strings")
        if values is None:
            return default
        strings = [value for value in values if isinstance(value, str)]
        if len(strings) != len(values):
            self.report(key, f"expected a list of strings, got {_excerpt(values)}")
        return tuple(strings)

    def table(self, key: str) -> _TableReader:
        """A reader of the table of a key; it is empty where the key is missing."""
        return _TableReader(self.take(key, dict, {}, "a table"), self.place_of(key), self.problems)

    def tables(self) -> Iterable[tuple[str, _TableReader]]:
        """All values that are tables, by key."""
        for key in self.remaining():
            value = self._values.pop(key)
            if isinstance(value, dict):
                yield key, _TableReader(value, self.place_of(key), self.problems)
            else:
                self.report(key, f"expected a table, got {_excerpt(value)}")

    def reject_unknown(self, known: str) -> None:
        """Report every key that was not taken."""
        for key in self._values:
            self.report(key, f"is not a known key; known: {known}")


def _excerpt(value: object) -> str:
    """A value for a message: ASCII, at most 60 characters."""
    try:
        text = ascii(value)
    except (ValueError, RecursionError):  # a number of more digits than Python writes, or a table nested too deep
        return f"a {type(value).__name__} that is too large to show"
    return text if len(text) <= 60 else text[:57] + "..."


def _manifest(top: _TableReader, path: Path) -> Manifest:
    if top.take("schema", int, None, "a whole number") is None:
        top.report("schema", f"is missing; write schema = {SCHEMA}")
    mirrors_table = top.table("mirrors")
    mirrors = mirrors_table.texts("urls")
    for number, url in enumerate(mirrors):
        if problem := check_source(url):
            mirrors_table.report(f"urls[{number}]", str(problem))
    mirrors_table.reject_unknown("urls")
    for key, _ in list(top.table("policy").tables()):
        top.report("policy", f"{key} cannot be enforced by this version, so the manifest is refused rather than trusted")
    models_table = top.table("models")
    models: dict[str, Model] = {}
    for key, table in models_table.tables():
        model = _model(key, table)
        if model is None:
            continue
        if str(model.id) in models:
            models_table.report(key, f"{model.id} is defined twice")
        models[str(model.id)] = model
    for key, what in validation.collisions(models):
        models_table.report(models[key].key, what)
    top.reject_unknown("schema, models, mirrors, policy")
    _check_extends(models, models_table)
    meaning = {key: model.entry for key, model in models.items()}
    return Manifest(path=path, models=models, mirrors=tuple(map(normalize, mirrors)), meaning=_digest(meaning))


def _model(key: str, table: _TableReader) -> Model | None:
    name, at, in_key = key.partition("@")
    version = table.text("version", in_key if at else None)
    if version is None:
        table.report("version", 'is missing; write version = "1.0.0", or put it into the key: name@1.0.0')
        version = "0"
    elif at and version != in_key:
        table.report("version", f"{version!r} is not the version in the key, {in_key!r}")
    for kind, part in (("name", name), ("version", version)):
        if what := validation.name_problem(kind, part):
            table.problems.append(Problem(table.place, what))
    sources = tuple(normalize(source) for source in table.texts("sources"))
    for number, source in enumerate(sources):
        if problem := check_source(source):
            table.report(f"sources[{number}]", str(problem))
    default, pin = table.text("default"), table.flag("pin")
    variants_table = table.table("variants")
    variants = {variant: _variant(variant, inner, bool(sources)) for variant, inner in variants_table.tables()}
    for variant, what in validation.collisions(variants):
        variants_table.report(variant, what)
    if not variants:
        table.report("variants", f"is missing; write [models.{json.dumps(key)}.variants.NAME]")
    if default is not None and default not in variants:
        table.report("default", f"{default!r} is not one of its variants: {', '.join(variants) or 'none'}")
    if default is None and len(variants) == 1:
        default = next(iter(variants))
    table.reject_unknown("version, sources, default, pin, variants")
    meaning = {
        "sources": sources,
        "default": default,
        "pin": pin,
        "variants": {variant: _meaning(value) for variant, value in variants.items()},
    }
    id_ = validation.ModelId(name, version)
    return Model(id=id_, key=key, sources=sources, variants=variants, default=default, pin=pin, entry=_digest(meaning))


def _variant(name: str, table: _TableReader, has_sources: bool) -> Variant:
    if what := validation.name_problem("variant", name):
        table.problems.append(Problem(table.place, what))
    files = tuple(_files(table))
    extends = table.texts("extends")
    listed = bool(files) or (bool(extends) and not has_sources)
    include = table.texts("include", () if listed else ("**",))
    exclude = table.texts("exclude")
    rename_table = table.table("rename")
    rename = {key: rename_table.text(key) or "" for key in rename_table.remaining()}
    for source_path, path in rename.items():
        for what in validation.path_problems(path):
            rename_table.report(source_path, what)
    for key, patterns in (("include", include), ("exclude", exclude)):
        _check_globs(table, key, patterns)
    if not has_sources and include:
        table.report("include", "there is no source to take files from; give the model `sources`, or list `files`")
    for number, text in enumerate(extends):
        if not re.fullmatch(r"[^@#]+@[^@#]+#[^@#]+", text):
            table.report(f"extends[{number}]", f"expected name@version#variant, got {_excerpt(text)}")
    index = table.text("index")
    components_table = table.table("components")
    components = {key: components_table.texts(key) for key in components_table.remaining()}
    for key, patterns in components.items():
        if what := validation.name_problem("variant", key):
            components_table.report(key, what)
        _check_globs(components_table, key, patterns)
    optional = table.texts("optional")
    for number, component in enumerate(optional):
        if component not in components:
            table.report(f"optional[{number}]", f"{component!r} is not one of its components")
    table.reject_unknown("include, exclude, rename, files, index, extends, components, optional")
    return Variant(
        include=include,
        exclude=exclude,
        rename=rename,
        files=files,
        index=index,
        extends=extends,
        components=components,
        optional=optional,
    )


def _files(table: _TableReader) -> Iterable[ListedFile]:
    rows = table.take("files", list, [], "a list of tables")
    paths: dict[str, int] = {}
    for number, row in enumerate(rows):
        key = f"files[{number}]"
        if not isinstance(row, dict):
            table.report(key, f"expected a table, got {_excerpt(row)}")
            continue
        inner = _TableReader(row, f"{table.place}.{key}", table.problems)
        path, size, sha256 = inner.text("path"), inner.take("size", int, None, "a whole number"), inner.text("sha256")
        source_path = inner.text("from", path)
        for field_, value in (("path", path), ("size", size), ("sha256", sha256)):
            if value is None and field_ not in row:
                inner.report(field_, "is missing")
        inner.reject_unknown("path, size, sha256, from")
        if size is not None and not 0 <= size <= MOST_SIZE:
            inner.report("size", f"expected a whole number from 0 to 2^53, got {_excerpt(size)}")
            size = None
        for what in validation.path_problems(path) if path is not None else ():
            inner.report("path", what)
        for what in validation.path_problems(source_path) if source_path is not None and source_path != path else ():
            inner.report("from", what)
        digest = _digest_of(inner, sha256)
        if path is None or source_path is None or size is None or digest is None:
            continue
        if (first := paths.setdefault(validation.folded(path), number)) != number:
            inner.report("path", f"is the same file as files[{first}].path")
        yield ListedFile(path=path, source_path=source_path, size=size, digest=digest)
    for path, what in validation.collisions(row["path"] for row in rows if _has_path(row)):
        if "folder" in what:
            table.report(f"files[{paths[validation.folded(path)]}].path", what)


def _digest_of(row: _TableReader, sha256: str | None) -> Digest | None:
    if sha256 is None:
        return None
    try:
        return Digest.parse("sha256:" + sha256.lower().removeprefix("sha256:"))
    except ValueError as error:
        row.report("sha256", str(error))
        return None


def _has_path(row: object) -> bool:
    return isinstance(row, dict) and isinstance(row.get("path"), str)


def _check_globs(table: _TableReader, key: str, patterns: Iterable[str]) -> None:
    for number, pattern in enumerate(patterns):
        if not pattern or "\0" in pattern or "\\" in pattern:
            table.report(f"{key}[{number}]", f"{_excerpt(pattern)} is not a glob over paths separated by '/'")


def _check_extends(models: Mapping[str, Model], table: _TableReader) -> None:
    """Report each `extends` that names no variant of this manifest, or leads back to its own variant."""

    def place(model: str, variant: str) -> str:
        return f"{table.place_of(models[model].key)}.variants.{variant}.extends"

    def visit(model: str, variant: str, path: tuple[str, ...]) -> None:
        for text in models[model].variants[variant].extends:
            other, _, other_variant = text.partition("#")
            if other not in models or other_variant not in models[other].variants:
                if not path:
                    table.problems.append(Problem(place(model, variant), f"{text!r} is not a variant of this manifest"))
            elif text in path or text == f"{model}#{variant}":
                table.problems.append(Problem(place(model, variant), f"{text!r} extends itself"))
                return
            elif len(path) < 100:
                visit(other, other_variant, (*path, f"{model}#{variant}"))

    for key, model in models.items():
        for variant in model.variants:
            visit(key, variant, ())


def _meaning(variant: Variant) -> dict[str, object]:
    files = [[f.path, f.source_path, f.size, str(f.digest)] for f in variant.files]
    return {
        "include": variant.include,
        "exclude": variant.exclude,
        "rename": dict(variant.rename),
        "files": sorted(files),
        "index": variant.index,
        "extends": variant.extends,
        "components": {key: list(value) for key, value in variant.components.items()},
        "optional": sorted(variant.optional),
    }


def _digest(meaning: object) -> str:
    text = json.dumps(meaning, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return "sha256:" + hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
