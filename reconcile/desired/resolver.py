"""Resolution of a manifest into a lockfile: list a source, select files, find the digest of each.

It is deterministic: the same manifest, previous lockfile and answers of sources give the same lockfile. A model whose table
did not change keeps its entry without a request, until an upgrade is requested.
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

_PREFETCH_HINT = (
    "check the network and lock again; if the source lists what it does not have, leave that out with `exclude`"
)


class Prefetcher(Protocol):
    """A fetcher of files that no listing names by sha256: it learns their digests and keeps them in the store."""

    def prefetch_all(self, locators: Iterable[str]) -> Mapping[str, tuple[Digest, int]]:
        """Fetch each file once. Returns digest and size in bytes by locator.

        Raises SourceError, Cancelled and the errors of the store.
        """
        ...

    def read(self, digest: Digest) -> bytes:
        """The content of a small file that was prefetched."""
        ...


WithRetries = Callable[[Callable[[], Listing]], Listing]
"""Makes a request, and repeats it while that may help."""


@dataclass(frozen=True, slots=True)
class _File:
    """A resolved file of a variant."""

    digest: Digest
    size: int  # bytes
    urls: tuple[str, ...]


def resolve(
    manifest: Manifest,
    previous: Lockfile | None,
    *,
    registry: Registry,
    prefetcher: Prefetcher,
    upgrade: Callable[[validation.ModelId], bool] = lambda id_: False,
    with_retries: WithRetries = lambda request: request(),
) -> Lockfile:
    """The lockfile for *manifest*.

    *upgrade* selects models to list again although their tables did not change. *with_retries* repeats a listing after
    every source of a model failed.

    Raises ManifestValidationError with every problem; SourceUnavailableError or AuthError with each source and its reason;
    the errors of the prefetcher.
    """
    resolver = _Resolver(manifest, previous, registry, prefetcher, upgrade, with_retries)
    models = {key: resolver.model(model) for key, model in manifest.models.items()}
    if resolver.problems:
        raise ManifestValidationError(str(manifest.path), resolver.problems)
    return Lockfile(manifest=manifest.meaning, models=models, blobs=resolver.blobs)


class _Resolver:
    """The state of one resolution: what was listed and prefetched so far, and the problems found."""

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
        self._registry, self._prefetcher, self._upgrade = registry, prefetcher, upgrade
        self._with_retries = with_retries
        self._base = manifest.path.parent
        self._listings: dict[str, Listing | SourceError] = {}
        self._prefetched: dict[str, tuple[Digest, int]] = {}
        self._variants: dict[tuple[str, str], dict[str, _File]] = {}
        self.problems: list[Problem] = []
        self.blobs: dict[Digest, LockedBlob] = {}

    def model(self, model: Model) -> LockedModel:
        """The lockfile's entry for a model; its blobs are added to ``blobs``."""
        key = str(model.id)
        entry = self._entry(model)
        locked = {}
        for name, variant in model.variants.items():
            files = self._files(key, name)
            components = {c: _match(files, globs) for c, globs in variant.components.items()}
            digests = {path: file.digest for path, file in files.items()}
            locked[name] = LockedVariant(files=digests, components=components, optional=tuple(sorted(variant.optional)))
            for file in files.values():
                self._add(file, f"{self._place(key)}.variants.{name}")
        return LockedModel(variants=locked, default=model.default, entry=entry, pin=model.pin)

    def _entry(self, model: Model) -> str:
        """The digest of a table's meaning, which with `extends` includes the tables that it extends."""
        return self._entry_with(model, frozenset())

    def _entry_with(self, model: Model, above: frozenset[str]) -> str:
        """The same without the tables in *above*, which the digest includes already: models may extend each other."""
        others = sorted(_extended(model))
        if not others:
            return model.entry
        above |= {str(model.id)}
        extended = (self._manifest.models[other] for other in others if other not in above)
        return str(Digest.of("\n".join([model.entry, *(self._entry_with(each, above) for each in extended)]).encode()))

    def _add(self, file: _File, place: str) -> None:
        known = self.blobs.get(file.digest)
        if known is not None and known.size != file.size:
            self.problems.append(Problem(place, f"{file.digest} has two sizes, {known.size} and {file.size}"))
        urls = dict.fromkeys((*(known.urls if known else ()), *file.urls))
        self.blobs[file.digest] = LockedBlob(size=file.size, urls=tuple(urls))

    def _files(self, key: str, name: str) -> dict[str, _File]:
        """The files of a variant by path in the tree."""
        if (key, name) not in self._variants:
            self._variants[key, name] = self._locked_before(key, name) or self._resolve(key, name)
        return self._variants[key, name]

    def _locked_before(self, key: str, name: str) -> dict[str, _File] | None:
        """The files of a variant from the previous lockfile; None where it has to be resolved."""
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
        """The prefixes of locators of a model's files, at any revision; with `extends`, those of the other models too."""
        seen, queue = {str(model.id)}, [model]
        while queue:
            each = queue.pop()
            for source in each.sources:
                yield from locator_prefixes(source)
            queue += [self._manifest.models[key] for key in _extended(each) - seen]
            seen |= _extended(each)

    def _resolve(self, key: str, name: str) -> dict[str, _File]:
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
            files |= self._files_of_source(model, variant, place)
        validation.check_paths(f"{place}.files", files, self.problems)
        if not files:
            self.problems.append(Problem(place, "has no files"))
        return files

    def _files_of_source(self, model: Model, variant: Variant, place: str) -> dict[str, _File]:
        source, listing = self._listing(model)
        selected = _select(listing.files, variant, place, self.problems)
        folder = absolute(listing.locator, self._base)
        locators = {listed.path: join_locator(folder, listed.path) + listed.suffix for listed in selected}
        if variant.index is not None:
            selected = self._by_index(variant.index, selected, locators, place)
        self._prefetch([locators[listed.path] for listed in selected if listed.sha256 is None or listed.size is None])
        files = {}
        for listed in selected:
            if listed.sha256 is None or listed.size is None:
                digest, size = self._prefetched[locators[listed.path]]
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
                self.problems.append(Problem(f"{place}.rename", f"two files of the source have the path {path!r}"))
            files[path] = _File(digest, size, urls)
        return files

    def _listing(self, model: Model) -> tuple[str, Listing]:
        """The first source that can be listed, and its listing."""
        reasons: list[SourceError] = []
        for source in model.sources:
            if source not in self._listings:
                self._listings[source] = self._list(source)
            found = self._listings[source]
            if isinstance(found, Listing):
                return source, found
            reasons.append(found)
        for source in model.sources:  # only now: another source is faster than a retry
            if (again := self._retry_listing(source)) is not None:
                return source, again
        rows = [{"source": error.locator, "code": error.code, "reason": error.what} for error in reasons]
        text = "; ".join(str(error) for error in reasons)
        hint = next(filter(None, map(hint_of, reasons)), "")
        hint = hint or "check the locator and the network, or list the variant's `files` in models.toml"
        kind = AuthError if any(isinstance(error, AccessDenied) for error in reasons) else SourceUnavailableError
        raise kind(f"{model.id}: no source could be listed ({text})", hint=hint, sources=rows)

    def _retry_listing(self, source: str) -> Listing | None:
        """The listing of a source that failed for a transient reason; None where it fails again."""
        failure = self._listings[source]
        if isinstance(failure, SourceError) and failure.transient:
            found = self._listings[source] = self._list(source, self._with_retries)
            return found if isinstance(found, Listing) else None
        return None

    def _list(self, source: str, retry: WithRetries = lambda request: request()) -> Listing | SourceError:
        locator = absolute(source, self._base)
        try:
            listing = retry(lambda: self._registry.find(locator).listing(locator))
        except SourceError as error:
            return error
        # A relative source stays relative in the lockfile.
        return Listing(locator=source if listing.locator == locator else listing.locator, files=listing.files)

    def _by_index(self, index: str, selected: list[Listed], locators: Mapping[str, str], place: str) -> list[Listed]:
        """Leave out the shards next to *index* that it does not name."""
        if index not in locators:
            self.problems.append(Problem(f"{place}.index", f"{index!r} is not among the files of this variant"))
            return selected
        self._prefetch([locators[index]])
        shards = _shards(self._prefetcher.read(self._prefetched[locators[index]][0]))
        if shards is None:
            self.problems.append(Problem(f"{place}.index", f"{index!r} is not an index: no weight_map"))
            return selected
        folder = str(PurePosixPath(index).parent)
        named = {str(PurePosixPath(folder) / shard) for shard in shards}
        suffixes = {PurePosixPath(shard).suffix for shard in shards}
        for path in sorted(named - {listed.path for listed in selected}):
            self.problems.append(Problem(f"{place}.index", f"names the shard {path!r}, which the source does not list"))

        def belongs(path: PurePosixPath) -> bool:
            return str(path.parent) != folder or path.suffix not in suffixes or str(path) in named

        return [listed for listed in selected if belongs(PurePosixPath(listed.path))]

    def _prefetch(self, locators: Iterable[str]) -> None:
        missing = [locator for locator in dict.fromkeys(locators) if locator not in self._prefetched]
        if not missing:
            return
        try:
            self._prefetched |= self._prefetcher.prefetch_all(missing)
        except SourceError as error:
            rows = [{"source": error.locator, "code": error.code, "reason": error.what}]
            kind = AuthError if isinstance(error, AccessDenied) else SourceUnavailableError
            raise kind(str(error), hint=hint_of(error) or _PREFETCH_HINT, sources=rows) from error

    def _place(self, key: str) -> str:
        return f"models.{json.dumps(self._manifest.models[key].key)}"


def _extended(model: Model) -> set[str]:
    """The models whose variants a model extends."""
    return {text.partition("#")[0] for variant in model.variants.values() for text in variant.extends}


def _select(files: Iterable[Listed], variant: Variant, place: str, problems: list[Problem]) -> list[Listed]:
    """The files that the globs of a variant select; those with problems are reported and left out."""
    include, exclude = GitIgnoreSpec.from_lines(variant.include), GitIgnoreSpec.from_lines(variant.exclude)
    files = sorted(files, key=lambda listed: listed.path)
    selected = [f for f in files if include.match_file(f.path) and not exclude.match_file(f.path)]
    for number, pattern in enumerate(variant.include):
        is_literal = not any(c in pattern for c in "*?[!")
        if is_literal and not any(GitIgnoreSpec.from_lines([pattern]).match_file(f.path) for f in files):
            problems.append(Problem(f"{place}.include[{number}]", f"the source lists no {pattern!r}"))
    for path in sorted(set(variant.rename) - {f.path for f in selected}):
        problems.append(Problem(f"{place}.rename", f"{path!r} is not among the files of this variant"))
    for listed in selected:
        # The paths of a hostile listing are checked before they are joined to a locator.
        problems += [Problem(f"{place}.include", what) for what in _problems_of(listed)]
    return [listed for listed in selected if not any(_problems_of(listed))]


def _problems_of(listed: Listed) -> Iterator[str]:
    yield from validation.path_problems(listed.path)
    if listed.size is not None and not 0 <= listed.size <= MOST_SIZE:
        yield f"the source lists {listed.path[:80]!a} with the size {listed.size}"
    if listed.sha256 is not None and not re.fullmatch("[0-9a-f]{64}", listed.sha256):
        yield f"the source lists {listed.path[:80]!a} with {listed.sha256[:80]!a}, which is no sha256"


def _match(files: Iterable[str], globs: Iterable[str]) -> tuple[str, ...]:
    spec = GitIgnoreSpec.from_lines(globs)
    return tuple(sorted(path for path in files if spec.match_file(path)))


def _shards(raw: bytes) -> set[str] | None:
    """The shards that an index names; None where it is no index."""
    try:
        weights = json.loads(raw)["weight_map"]
        return {shard for shard in weights.values() if isinstance(shard, str) and not any(validation.path_problems(shard))}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
