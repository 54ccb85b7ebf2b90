"""Selection: selectors resolved against a lockfile, and the components that a tree is made of."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from modelstow.cas import StoreStateError
from modelstow.cas.errors import Cause
from modelstow.cas.records import INVALID

from ..errors import InvalidConfigError, InvalidModelIdError, ModelNotFoundError, VariantNotFoundError, listing
from .lockfile import LockedVariant, Lockfile
from .validation import ModelId, Selector


@dataclass(frozen=True, slots=True, order=True)
class VariantId:
    """The identity of one variant of a lockfile."""

    model: str  # name@version
    variant: str

    @classmethod
    def parse(cls, text: str) -> VariantId:
        """The identity that a record names, as ``str`` writes it."""
        model, _, variant = text.partition("#")
        return cls(model, variant)

    def __str__(self) -> str:
        return f"{self.model}#{self.variant}"

    @property
    def tree(self) -> str:
        """The path of its tree, relative to the store."""
        return f"models/{self.model}/{self.variant}"


def all_variants(lock: Lockfile) -> list[VariantId]:
    """All variants of a lockfile, sorted."""
    return [VariantId(key, variant) for key in sorted(lock.models) for variant in sorted(lock.models[key].variants)]


def select(lock: Lockfile, text: str, variant: str | None = None) -> VariantId:
    """The variant that a selector means; an explicit *variant* wins over the selector's.

    Raises InvalidModelIdError, ModelNotFoundError, VariantNotFoundError, each listing what exists.
    """
    selector = Selector.parse(text)
    key = _model(lock, selector)
    model = lock.models[key]
    name = variant or selector.variant or model.default
    variants = sorted(model.variants)
    if name is None and len(variants) == 1:
        name = variants[0]
    if name is None or name not in model.variants:
        what = f"{key} has no variant {name!r}" if name else f"{key} has no default variant; name one"
        raise VariantNotFoundError(
            f"{what}; variants: {listing(variants)}",
            hint=f"e.g. {key}#{variants[0]}" if variants else "",
            model_id=key,
            variant=name or "",
            available_variants=variants,
        )
    return VariantId(key, name)


def _model(lock: Lockfile, selector: Selector) -> str:
    keys = sorted(lock.models)
    wanted = f"{selector.name}@{selector.version}" if selector.version is not None else selector.name
    if selector.version is not None:
        matches = [key for key in keys if key == wanted]
    else:
        matches = [key for key in keys if ModelId.parse(key).name == selector.name]
    if len(matches) > 1:
        raise InvalidModelIdError(
            f"{selector.name} is locked in several versions: {listing(matches)}",
            hint=f"name one, e.g. {matches[-1]}",
            model_id=selector.name,
            available_models=matches,
        )
    if not matches:
        raise ModelNotFoundError(
            f"{wanted} is not in the lockfile; locked: {listing(keys) or 'nothing'}",
            hint="check the name, or add it to models.toml and run `modelstow lock`",
            model_id=wanted,
            available_models=keys,
        )
    return matches[0]


def check_components(id_: VariantId, variant: LockedVariant, names: Iterable[str]) -> None:
    """Raises InvalidConfigError for a component that the variant does not have."""
    for name in names:
        if name not in variant.components:
            raise InvalidConfigError(
                f"{id_} has no component {name!r}; components: {listing(sorted(variant.components)) or 'none'}",
                available_components=sorted(variant.components),
            )


def fingerprint(variant: LockedVariant) -> str:
    """A hash that is equal for two variants exactly when every path has the same digest."""
    hasher = hashlib.sha256()
    for path, digest in sorted(variant.files.items()):
        hasher.update(f"{path}\0{digest}\n".encode())
    return hasher.hexdigest()


def tree_of_folder(folder: Path, root: Path) -> str:
    """The tree name of a folder outside the store: its real absolute path. Raises InvalidConfigError inside the store."""
    real = os.path.realpath(folder)
    if os.path.lexists(real) and not os.path.isdir(real):
        raise InvalidConfigError(
            f"{folder} exists and is not a folder", hint="--into takes a folder, or a path that does not exist"
        )
    if Path(real).is_relative_to(os.path.realpath(root)) or Path(os.path.realpath(root)).is_relative_to(real):
        raise InvalidConfigError(f"{folder} is inside the store at {root}, or contains it", hint="choose another --into")
    return real


PINNED = "pinned"
"""The label of trees that a manifest pins."""
_PATHS = "paths"  # the label of one of several variants: its paths, separated by line feeds
_VARIANTS = "variants"  # the label of trees of several variants: a JSON list of the labels of each


def labels(
    id_: VariantId, lockfile: Path | None, with_: Iterable[str], without: Iterable[str], *, pin: bool
) -> dict[str, str]:
    """The labels of the inventory of a tree of one variant: its origin, and what must be known of it without a lockfile."""
    labels_ = {"model": id_.model, "variant": id_.variant}
    if pin:
        labels_[PINNED] = "yes"
    if lockfile is not None:
        labels_["lockfile"] = str(lockfile)
    if names := sorted(set(with_)):
        labels_["with"] = ",".join(names)
    if names := sorted(set(without)):
        labels_["without"] = ",".join(names)
    return labels_


def with_paths(labels: Mapping[str, str], paths: Iterable[str]) -> dict[str, str]:
    """The labels of one variant in a tree of several, with the paths that are its own."""
    return {**labels, _PATHS: "\n".join(sorted(paths))}


def own_paths(labels: Mapping[str, str], every: Iterable[str]) -> Iterable[str]:
    """The paths of one variant in a tree: those of its labels, or in a tree of its own *every* one."""
    return labels[_PATHS].split("\n") if _PATHS in labels else every


def merge_labels(trees: Iterable[Mapping[str, str]]) -> dict[str, str]:
    """The labels of one tree of several variants, from the labels that a tree of each alone would have."""
    rows = sorted(trees, key=lambda row: (row["model"], row["variant"]))
    lockfile = {name: value for row in rows for name, value in row.items() if name == "lockfile"}
    return {_VARIANTS: json.dumps([{name: row[name] for name in row if name != "lockfile"} for row in rows]), **lockfile}


def labels_by_variant(labels: Mapping[str, str]) -> dict[VariantId, Mapping[str, str]]:
    """The labels of each variant of a tree, apart from the lockfile's. Raises StoreStateError where they name none."""
    try:
        rows = json.loads(labels[_VARIANTS]) if _VARIANTS in labels else [labels]
        found = {VariantId(str(row.get("model", "")), str(row.get("variant", ""))): row for row in rows}
    except INVALID as error:
        raise StoreStateError(f"a tree's record names no variants ({error})", cause=Cause.ROOT_UNREADABLE) from error
    if not found:  # kept by none of its variants, it would be removed
        raise StoreStateError("a tree's record names no variants", cause=Cause.ROOT_UNREADABLE)
    return found


def remembered(labels: Mapping[str, str], id_: VariantId) -> tuple[frozenset[str], frozenset[str]]:
    """The components with and without which a variant was placed in a tree, by the tree's labels."""
    mine = labels_by_variant(labels).get(id_, {}) if _VARIANTS in labels else labels

    def names(key: str) -> frozenset[str]:
        return frozenset(filter(None, mine.get(key, "").split(",")))

    return names("with"), names("without")
