"""From what people type to trees: selectors against a lockfile, variants against the components that were chosen."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ..errors import InvalidConfigError, InvalidModelIdError, ModelNotFoundError, VariantNotFoundError, listing
from .lockfile import LockedVariant, Lockfile
from .validation import ModelId, Selector


@dataclass(frozen=True, slots=True, order=True)
class VariantId:
    """One variant of a lockfile."""

    model: str  # name@version
    variant: str

    def __str__(self) -> str:
        return f"{self.model}#{self.variant}"

    @property
    def tree(self) -> str:
        """Where its tree stands, relative to the store."""
        return f"models/{self.model}/{self.variant}"


def every(lock: Lockfile) -> list[VariantId]:
    """All variants of a lockfile."""
    return [VariantId(key, variant) for key in sorted(lock.models) for variant in sorted(lock.models[key].variants)]


def choose(lock: Lockfile, text: str, variant: str | None = None) -> VariantId:
    """The one variant that a selector means; an explicit *variant* wins over the selector's.

    Raises InvalidModelIdError, ModelNotFoundError, VariantNotFoundError, each listing what there is.
    """
    selector = Selector.parse(text)
    key = _model(lock, selector)
    model = lock.models[key]
    name = variant or selector.variant or model.default
    variants = sorted(model.variants)
    if name is None and len(variants) == 1:
        name = variants[0]
    if name is None or name not in model.variants:
        what = f"{key} has no variant {name!r}" if name else f"{key} has no default variant; say which"
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
    if selector.version is not None:
        fitting = [f"{selector.name}@{selector.version}"] * (f"{selector.name}@{selector.version}" in lock.models)
    else:
        fitting = [key for key in keys if ModelId.parse(key).name == selector.name]
    if len(fitting) > 1:
        raise InvalidModelIdError(
            f"{selector.name} is locked in several versions: {listing(fitting)}",
            hint=f"say which, e.g. {fitting[-1]}",
            model_id=selector.name,
            available_models=fitting,
        )
    if not fitting:
        wanted = f"{selector.name}@{selector.version}" if selector.version else selector.name
        raise ModelNotFoundError(
            f"{wanted} is not in the lockfile; locked: {listing(keys) or 'nothing'}",
            hint="check the name, or add it to models.toml and run `modelstow lock`",
            model_id=wanted,
            available_models=keys,
        )
    return fitting[0]


def check_components(chosen: VariantId, variant: LockedVariant, names: Iterable[str]) -> None:
    """Raises InvalidConfigError for a component that the variant does not have."""
    for name in names:
        if name not in variant.components:
            raise InvalidConfigError(
                f"{chosen} has no component {name!r}; components: {listing(sorted(variant.components)) or 'none'}",
                available_components=sorted(variant.components),
            )


def fingerprint(variant: LockedVariant) -> str:
    """Equal for two variants exactly when every path holds the same bytes."""
    hasher = hashlib.sha256()
    for path, digest in sorted(variant.files.items()):
        hasher.update(f"{path}\0{digest}\n".encode())
    return hasher.hexdigest()


def tree_of_folder(folder: Path, root: Path) -> str:
    """The tree name of an outside folder: its real absolute path. Raises InvalidConfigError inside the store."""
    real = os.path.realpath(folder)
    if os.path.lexists(real) and not os.path.isdir(real):
        raise InvalidConfigError(
            f"{folder} is there and is no folder", hint="--into takes a folder, or a name that is free"
        )
    if Path(real).is_relative_to(os.path.realpath(root)) or Path(os.path.realpath(root)).is_relative_to(real):
        raise InvalidConfigError(f"{folder} and the store at {root} lie in each other", hint="choose another --into")
    return real


PINNED = "pinned"
"""The label of a tree that its manifest pins."""


def labels(
    chosen: VariantId, lockfile: Path | None, with_: Iterable[str], without: Iterable[str], *, pin: bool
) -> dict[str, str]:
    """What a tree's inventory says of where it came from, and what else has to be known of it without a lockfile."""
    found = {"model": chosen.model, "variant": chosen.variant}
    if pin:
        found[PINNED] = "yes"
    if lockfile is not None:
        found["lockfile"] = str(lockfile)
    if chosen_with := sorted(set(with_)):
        found["with"] = ",".join(chosen_with)
    if chosen_without := sorted(set(without)):
        found["without"] = ",".join(chosen_without)
    return found


def remembered(found: Mapping[str, str]) -> tuple[frozenset[str], frozenset[str]]:
    """The components that were chosen when the tree was made: with, without."""

    def names(key: str) -> frozenset[str]:
        return frozenset(filter(None, found.get(key, "").split(",")))

    return names("with"), names("without")
