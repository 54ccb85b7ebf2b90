"""`init`, `add`, `remove`, `lock`: the commands about models.toml and models.lock."""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path
from typing import Any

import tomlkit
import tomlkit.exceptions

from modelstow.backends import redact
from modelstow.cas import BlobStore
from modelstow.cas.durable import write_file

from .. import resolution
from ..desired import manifest as manifests
from ..desired.locators import EXAMPLES, check_source, normalize
from ..desired.validation import name_problem
from ..errors import InvalidConfigError, ManifestValidationError, ModelNotFoundError, Problem, listing
from ..events.events import Warning
from ..project import find_manifest
from .output import count, size
from .parser import VARIANT as _VARIANT
from .progress import progress_shown
from .session import Answer, Session

_TEMPLATE = """\
# Models of this project. `modelstow lock` pins them to models.lock; `modelstow reconcile` makes the disk equal it.
schema = 1

# [models."minilm"]
# version = "1.0.0"
# sources = ["https://models.example.org/minilm/"]   # tried in order; a folder, http(s)://, hf://, s3://
# default = "fp32"                                    # the variant meant when none is named
#
# [models."minilm".variants.fp32]
# include = ["*.json", "model.safetensors"]           # gitignore-style globs; default ["**"]
#
# [models."minilm".variants.fp16]
# include = ["*.json", "model.fp16.safetensors"]
# rename = { "model.fp16.safetensors" = "model.safetensors" }
"""


def run_init(session: Session) -> Answer:
    path = session.settings.manifest if session.args.manifest else Path.cwd() / "models.toml"
    assert path is not None
    existed = path.exists()
    if existed and not session.args.shared:
        raise InvalidConfigError(f"{path} exists already", hint="edit it, or run `modelstow add LOCATOR`")
    lines = []
    if not existed:
        write_file(path, _TEMPLATE.encode())
        lines.append(f"wrote {path}")
    if session.args.shared:
        store = BlobStore.open(session.settings.root, shared=True)
        if not store.config.shared:
            raise InvalidConfigError(f"{session.settings.root} is a private store already", hint="choose another --root")
        lines.append(f"the store at {session.settings.root} is shared with its group")
    return Answer(document={"changed": not existed, "manifest": str(path)}, lines=tuple(lines))


def run_add(session: Session) -> Answer:
    args = session.args
    locator = _checked_source(args.locator)
    path = session.settings.manifest or Path.cwd() / "models.toml"
    if "://" not in locator and not os.path.isabs(locator):  # relative to here, but in the manifest relative to its folder
        locator = os.path.relpath(os.path.abspath(locator), path.parent)
    document = _parse(path) if path.exists() else tomlkit.parse(_TEMPLATE)
    name, version = _suggested_id(locator)
    name, version = args.name or name, args.model_version or version
    if not name:
        raise InvalidConfigError(f"no model name can be derived from {locator!r}", hint="choose one with --name")
    for kind, part in (("name", name), ("version", version), ("variant", args.variant)):
        if what := name_problem(kind, part):
            raise InvalidConfigError(what, hint="choose another with --name, --model-version or --variant")
    models = document.setdefault("models", tomlkit.table(is_super_table=True))
    key = _key_of(models, name, version)
    changed = True
    if key is not None:
        sources = models[key].setdefault("sources", tomlkit.array())
        changed = locator not in list(sources)
        if changed:
            sources.append(locator)
        changed |= _add_variant(args, models[key].setdefault("variants", tomlkit.table(is_super_table=True)))
    else:
        exists = name in models  # in another version
        models[f"{name}@{version}" if exists else name] = _new_model(args, locator, "" if exists else version)
    text = tomlkit.dumps(document)
    manifests.parse(text.encode(), path)  # never write a manifest that cannot be read
    if changed:
        write_file(path, text.encode())
    line = f"{name}@{version}: {locator}" + ("" if changed else " (unchanged)")
    return Answer(document={"changed": changed, "model": f"{name}@{version}"}, lines=(line,))


def run_remove(session: Session) -> Answer:
    path = find_manifest(session.settings)
    document = _parse(path)
    models = document.get("models", {})
    keys = {f"{key.partition('@')[0]}@{key.partition('@')[2] or models[key].get('version', '')}": key for key in models}
    name = session.args.name
    matches = [id_ for id_ in keys if name in (id_, id_.partition("@")[0])]
    if not matches:
        raise ModelNotFoundError(
            f"{name} is not in {path}; models: {listing(sorted(keys)) or 'nothing'}", available_models=sorted(keys)
        )
    if len(matches) > 1:
        raise InvalidConfigError(
            f"{name} is listed in several versions: {listing(matches)}", hint=f"name one, e.g. {matches[0]}"
        )
    del models[keys[matches[0]]]
    write_file(path, tomlkit.dumps(document).encode())
    return Answer(document={"changed": True, "model": matches[0]}, lines=(f"removed {matches[0]}; run `modelstow lock`",))


def run_lock(session: Session) -> Answer:
    args = session.args
    if args.check and args.upgrade is None:
        stale = resolution.is_stale(session.settings)
        found = resolution.read_lockfile(session.settings)
    else:
        with progress_shown(session):
            found = resolution.lock(session.settings, upgrade=args.upgrade, write=not args.check, events=session.events)
        stale = args.check and found.changed
    document = {
        "lock": str(found.path),
        "changed": stale or found.changed,
        "models": len(found.lock.models),
        "files": found.files,
        "blobs": len(found.lock.blobs),
        "bytes": found.bytes,
        "warnings": [{"code": w.code, "path": w.path, "message": w.message} for w in found.warnings],
    }
    for warning in found.warnings:
        session.events.emit(Warning(text=warning.message))
    if args.check:
        line = f"{found.path} is stale: run `modelstow lock`" if stale else f"{found.path} is up to date"
        return Answer(document=document, lines=(line,), code=7 if stale else 0)
    did = "locked" if found.changed else "unchanged:"
    what = f"{count(len(found.lock.models), 'model')}, {count(found.files, 'file')}, {count(len(found.lock.blobs), 'blob')}"
    return Answer(document=document, lines=(f"{did} {what}, {size(found.bytes)} in {found.path}",))


def _parse(path: Path) -> tomlkit.TOMLDocument:
    try:
        return tomlkit.parse(path.read_text("utf-8"))
    except (tomlkit.exceptions.TOMLKitError, UnicodeDecodeError) as error:
        raise ManifestValidationError(str(path), [Problem("", f"it is not TOML: {error}")]) from error


def _checked_source(text: str) -> str:
    """The canonical form of a source that the user typed. Raises InvalidConfigError where it is none."""
    locator = normalize(text)
    if problem := check_source(locator):
        raise InvalidConfigError(f"{redact(locator) or 'nothing'}: {problem.what}", hint=problem.hint)
    if "://" in locator or os.path.isdir(locator):
        return locator
    if os.path.exists(locator):
        raise InvalidConfigError(f"{locator} is a file", hint="name its folder, and the file with --include")
    hint = f"name a folder that exists, or a locator like {EXAMPLES}"
    if "/" in locator and not locator.startswith((".", "/")) and not check_source(f"hf://{locator}"):
        hint = f"for a repository of a hub, write hf://{locator}"
    raise InvalidConfigError(f"there is no folder {locator}", hint=hint)


def _suggested_id(locator: str) -> tuple[str, str]:
    """The name and version that a locator suggests, as ``…/minilm/1.2.0`` does; the name may be empty."""
    rest, _, last = re.sub(r"^[a-z0-9+]+://", "", locator).rstrip("/").rpartition("/")
    version = "1.0.0"
    if "/" in rest and re.fullmatch(r"v?[0-9]+(\.[0-9]+)+", last):
        version, last = last.removeprefix("v"), rest.rpartition("/")[2]
    return re.sub(r"[^A-Za-z0-9._-]+", "-", last.partition("@")[0]).strip("-._").lower(), version


def _key_of(models: dict[str, dict[str, str]], name: str, version: str) -> str | None:
    for key, table in models.items():
        in_key_name, _, in_key = key.partition("@")
        if in_key_name == name and (in_key or table.get("version")) == version:
            return key
    return None


def _new_model(args: argparse.Namespace, locator: str, version: str) -> tomlkit.items.Table:
    model = tomlkit.table()
    if version:
        model["version"] = version
    model["sources"] = [locator]
    model["variants"] = tomlkit.table(is_super_table=True)
    model["variants"][args.variant] = _new_variant(args)
    return model


def _add_variant(args: argparse.Namespace, variants: Any) -> bool:
    """Add the requested variant to a model that exists; False where none is requested, or where the model has it.

    Raises InvalidConfigError where a variant of that name takes other files.
    """
    requested = args.include or args.exclude or args.variant != _VARIANT
    variant = _new_variant(args)
    if args.variant in variants and requested and variants[args.variant].unwrap() != variant.unwrap():
        hint = "choose another name with --variant, or edit models.toml"
        raise InvalidConfigError(f"there is a variant {args.variant!r}, which takes other files", hint=hint)
    if not requested or args.variant in variants:
        return False
    variants[args.variant] = variant
    return True


def _new_variant(args: argparse.Namespace) -> tomlkit.items.Table:
    variant = tomlkit.table()
    variant["include"] = args.include or ["**"]
    if exclude := args.exclude:
        variant["exclude"] = exclude
    return variant
