"""From manifest to lockfile: list a source, choose files, name every one by its digest.

The same manifest, previous lockfile and answers of sources give the same lockfile. A model whose table did not change
keeps its entry, and no source is asked, until an upgrade is.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Protocol

from pathspec import GitIgnoreSpec

from modelstow.backends import AccessDenied, Listed, Listing, Registry, SourceError, join_locator, locator_prefixes
from modelstow.cas import Digest

from ..errors import AuthError, ManifestValidationError, Problem, SourceUnavailableError
from ..hints import hint_of
from . import validation
from .lockfile import MOST_SIZE, LockedBlob, LockedModel, LockedVariant, Lockfile, absolute
from .manifest import Manifest, Model, Variant

_PULL_HINT = "check the network and lock again; if the source lists what it does not have, leave that out with `exclude`"


class Prefetcher(Protocol):
    """What fetches files that no listing names, proves them by naming them, and keeps them."""

    def prefetch_all(self, locators: Iterable[str]) -> Mapping[str, tuple[Digest, int]]:
        """Fetch each once; names and sizes in bytes. Raises SourceError, Stopped and what the store raises."""
        ...

    def read(self, digest: Digest) -> bytes:
        """A small file that was pulled."""
        ...


WithRetries = Callable[[Callable[[], Listing]], Listing]


@dataclass(frozen=True, slots=True)
class _File:
    """A file on its way into the lockfile."""

    digest: Digest
    size: int
    urls: tuple[str, ...]


def resolve(
    manifest: Manifest,
    previous: Lockfile | None,
    *,
    registry: Registry,
    prefetcher: Prefetcher,
    upgrade: Callable[[validation.ModelId], bool] = lambda id_: False,
    with_retries: WithRetries = lambda ask: ask(),
) -> Lockfile:
    """The lockfile for *manifest*.

    *upgrade* says which models are listed again although nothing changed; *with_retries* repeats a listing that failed
    for every source of a model, where repeating may help.

    Raises ManifestValidationError with every problem; SourceUnavailableError naming each source and its reason;
    AuthError; what the prefetcher raises.
    """
    resolver = _Resolver(manifest, previous, registry, prefetcher, upgrade, with_retries)
    models = {key: resolver.model(model) for key, model in manifest.models.items()}
    if resolver.problems:
        raise ManifestValidationError(str(manifest.path), resolver.problems)
    return Lockfile(manifest=manifest.meaning, models=models, blobs=resolver.blobs)


class _Resolver:
    """One resolution: what was listed and pulled so far, and what is wrong."""

    def __init__(
        self,
        manifest: Manifest,
        previous: Lockfile | None,
        registry: Registry,
        prefetcher: Prefetcher,
        upgrade: Callable[[validation.ModelId], bool],
        with_retries: WithRetries,
    ) -> None:
        self._manifest, self._previous = manifest, previous
        self._registry, self._depot, self._upgrade = registry, prefetcher, upgrade
        self._patiently = with_retries
        self._base = manifest.path.parent
        self._listings: dict[str, Listing | SourceError] = {}
        self._pulled: dict[str, tuple[Digest, int]] = {}
        self._variants: dict[tuple[str, str], dict[str, _File]] = {}
        self.problems: list[Problem] = []
        self.blobs: dict[Digest, LockedBlob] = {}

    def model(self, model: Model) -> LockedModel:
        key = str(model.id)
        entry = self._entry(model)
        locked = {}
        for name, variant in model.variants.items():
            files = self._files(key, name)
            components = {c: _matching(files, globs) for c, globs in variant.components.items()}
            digests = {path: file.digest for path, file in files.items()}
            locked[name] = LockedVariant(files=digests, components=components, optional=tuple(sorted(variant.optional)))
            for file in files.values():
                self._add(file, f"{self._place(key)}.variants.{name}")
        return LockedModel(variants=locked, default=model.default, entry=entry, pin=model.pin)

    def _entry(self, model: Model) -> str:
        """The digest of this table's meaning; with `extends`, of the tables behind it too."""
        return self._entry_behind(model, frozenset())

    def _entry_behind(self, model: Model, above: frozenset[str]) -> str:
        """Two models may extend variants of each other; what stands *above* is in the digest already."""
        others = sorted(_extended(model))
        if not others:
            return model.entry
        above |= {str(model.id)}
        behind = (self._manifest.models[other] for other in others if other not in above)
        return str(Digest.of("\n".join([model.entry, *(self._entry_behind(each, above) for each in behind)]).encode()))

    def _add(self, file: _File, place: str) -> None:
        known = self.blobs.get(file.digest)
        if known is not None and known.size != file.size:
            self.problems.append(Problem(place, f"{file.digest} has two sizes, {known.size} and {file.size}"))
        urls = dict.fromkeys((*(known.urls if known else ()), *file.urls))
        self.blobs[file.digest] = LockedBlob(size=file.size, urls=tuple(urls))

    def _files(self, key: str, name: str) -> dict[str, _File]:
        """The files of one variant by path in the tree."""
        if (key, name) not in self._variants:
            self._variants[key, name] = self._kept(key, name) or self._resolved(key, name)
        return self._variants[key, name]

    def _kept(self, key: str, name: str) -> dict[str, _File] | None:
        model = self._manifest.models[key]
        old = self._previous.models.get(key) if self._previous else None
        if self._previous is None or old is None or old.entry != self._entry(model) or self._upgrade(model.id):
            return None
        if name not in old.variants:
            return None
        blobs, ours = self._previous.blobs, tuple(self._prefixes(model))
        return {
            path: _File(d, blobs[d].size, tuple(url for url in blobs[d].urls if url.startswith(ours)))
            for path, d in old.variants[name].files.items()
        }

    def _prefixes(self, model: Model) -> Iterator[str]:
        """How locators of this model's files begin, whatever revision they are pinned to; with `extends`, of others too."""
        seen, waiting = {str(model.id)}, [model]
        while waiting:
            each = waiting.pop()
            for source in each.sources:
                yield from locator_prefixes(source)
            waiting += [self._manifest.models[key] for key in _extended(each) - seen]
            seen |= _extended(each)

    def _resolved(self, key: str, name: str) -> dict[str, _File]:
        model = self._manifest.models[key]
        variant = model.variants[name]
        place = f"{self._place(key)}.variants.{name}"
        files: dict[str, _File] = {}
        for text in variant.extends:
            other, _, other_variant = text.partition("#")
            files |= self._files(other, other_variant)
        for listed in variant.files:
            urls = tuple(join_locator(source, listed.source_path) for source in model.sources)
            files[listed.path] = _File(listed.digest, listed.size, urls)
        if variant.include:
            files |= self._chosen(model, variant, place)
        validation.check_paths(f"{place}.files", files, self.problems)
        if not files:
            self.problems.append(Problem(place, "has no files"))
        return files

    def _chosen(self, model: Model, variant: Variant, place: str) -> dict[str, _File]:
        source, listing = self._listing(model)
        wanted = _select(listing.files, variant, place, self.problems)
        folder = absolute(listing.locator, self._base)
        locators = {listed.path: join_locator(folder, listed.path) + listed.suffix for listed in wanted}
        if variant.index is not None:
            wanted = self._by_index(variant.index, wanted, locators, place)
        self._pull([locators[listed.path] for listed in wanted if listed.sha256 is None or listed.size is None])
        files = {}
        for listed in wanted:
            if listed.sha256 is None or listed.size is None:
                digest, size = self._pulled[locators[listed.path]]
            else:
                digest, size = Digest.of_hex(listed.sha256), listed.size
            urls = tuple(
                join_locator(listing.locator, listed.path) + listed.suffix
                if other == source
                else join_locator(other, listed.path)
                for other in model.sources
            )
            path = variant.rename.get(listed.path, listed.path)
            if path in files:
                self.problems.append(Problem(f"{place}.rename", f"two files of the source would be {path!r}"))
            files[path] = _File(digest, size, urls)
        return files

    def _listing(self, model: Model) -> tuple[str, Listing]:
        """The first source that answers, and what it lists."""
        reasons: list[SourceError] = []
        for source in model.sources:
            if source not in self._listings:
                self._listings[source] = self._ask(source)
            found = self._listings[source]
            if isinstance(found, Listing):
                return source, found
            reasons.append(found)
        for source in model.sources:  # only now: another source is quicker than another attempt
            if (again := self._ask_again(source)) is not None:
                return source, again
        rows = [{"source": error.locator, "code": error.code, "reason": error.what} for error in reasons]
        text = "; ".join(str(error) for error in reasons)
        hint = next(filter(None, map(hint_of, reasons)), "")
        hint = hint or "check the address and the network, or list the variant's `files` in models.toml"
        kind = AuthError if any(isinstance(error, AccessDenied) for error in reasons) else SourceUnavailableError
        raise kind(f"{model.id}: no source could be listed ({text})", hint=hint, sources=rows)

    def _ask_again(self, source: str) -> Listing | None:
        before = self._listings[source]
        if isinstance(before, SourceError) and before.transient:
            found = self._listings[source] = self._ask(source, self._patiently)
            return found if isinstance(found, Listing) else None
        return None

    def _ask(self, source: str, how: WithRetries = lambda ask: ask()) -> Listing | SourceError:
        locator = absolute(source, self._base)
        try:
            listing = how(lambda: self._registry.find(locator).listing(locator))
        except SourceError as error:
            return error
        # What was asked by its absolute path stays relative in the lock.
        return Listing(locator=source if listing.locator == locator else listing.locator, files=listing.files)

    def _by_index(self, index: str, wanted: list[Listed], locators: Mapping[str, str], place: str) -> list[Listed]:
        """Drop the shards beside *index* that it does not name."""
        if index not in locators:
            self.problems.append(Problem(f"{place}.index", f"{index!r} is not among the files of this variant"))
            return wanted
        self._pull([locators[index]])
        shards = _shards(self._depot.read(self._pulled[locators[index]][0]))
        if shards is None:
            self.problems.append(Problem(f"{place}.index", f"{index!r} is not an index: no weight_map"))
            return wanted
        folder = str(PurePosixPath(index).parent)
        named = {str(PurePosixPath(folder) / shard) for shard in shards}
        suffixes = {PurePosixPath(shard).suffix for shard in shards}
        for path in sorted(named - {listed.path for listed in wanted}):
            self.problems.append(Problem(f"{place}.index", f"names the shard {path!r}, which the source does not list"))

        def belongs(path: PurePosixPath) -> bool:
            return str(path.parent) != folder or path.suffix not in suffixes or str(path) in named

        return [listed for listed in wanted if belongs(PurePosixPath(listed.path))]

    def _pull(self, locators: Iterable[str]) -> None:
        missing = [locator for locator in dict.fromkeys(locators) if locator not in self._pulled]
        if not missing:
            return
        try:
            self._pulled |= self._depot.prefetch_all(missing)
        except SourceError as error:
            rows = [{"source": error.locator, "code": error.code, "reason": error.what}]
            kind = AuthError if isinstance(error, AccessDenied) else SourceUnavailableError
            raise kind(str(error), hint=hint_of(error) or _PULL_HINT, sources=rows) from error

    def _place(self, key: str) -> str:
        return f"models.{json.dumps(self._manifest.models[key].key)}"


def _extended(model: Model) -> set[str]:
    """The models whose variants it extends."""
    return {text.partition("#")[0] for variant in model.variants.values() for text in variant.extends}


def _select(files: Iterable[Listed], variant: Variant, place: str, problems: list[Problem]) -> list[Listed]:
    include, exclude = GitIgnoreSpec.from_lines(variant.include), GitIgnoreSpec.from_lines(variant.exclude)
    every = sorted(files, key=lambda listed: listed.path)
    wanted = [f for f in every if include.match_file(f.path) and not exclude.match_file(f.path)]
    for number, pattern in enumerate(variant.include):
        plain = not any(c in pattern for c in "*?[!")
        if plain and not any(GitIgnoreSpec.from_lines([pattern]).match_file(f.path) for f in every):
            problems.append(Problem(f"{place}.include[{number}]", f"the source lists no {pattern!r}"))
    for path in sorted(set(variant.rename) - {f.path for f in wanted}):
        problems.append(Problem(f"{place}.rename", f"{path!r} is not among the files of this variant"))
    for listed in wanted:
        # A hostile listing must not reach a join: its paths are looked at before anything is asked for.
        problems += [Problem(f"{place}.include", what) for what in _problems_of(listed)]
    return [listed for listed in wanted if not any(_problems_of(listed))]


def _problems_of(listed: Listed) -> Iterator[str]:
    yield from validation.path_problems(listed.path)
    if listed.size is not None and not 0 <= listed.size <= MOST_SIZE:
        yield f"the source lists {listed.path[:80]!a} with the size {listed.size}"
    if listed.sha256 is not None and not re.fullmatch("[0-9a-f]{64}", listed.sha256):
        yield f"the source lists {listed.path[:80]!a} with {listed.sha256[:80]!a}, which is no sha256"


def _matching(files: Iterable[str], globs: Iterable[str]) -> tuple[str, ...]:
    spec = GitIgnoreSpec.from_lines(globs)
    return tuple(sorted(path for path in files if spec.match_file(path)))


def _shards(raw: bytes) -> set[str] | None:
    try:
        weights = json.loads(raw)["weight_map"]
        return {shard for shard in weights.values() if isinstance(shard, str) and not any(validation.path_problems(shard))}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
