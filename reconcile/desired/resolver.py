"""Resolution of a manifest into a lockfile: list a source, select files, find the digest of each.

It is deterministic: the same manifest, previous lockfile and answers of sources give the same lockfile. A model whose table
did not change keeps its entry without a request, until an upgrade is requested.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

from modelstow.backends import AccessDenied, Changed, Listed, Listing, Registry, SourceError, join_locator, locator_prefixes
from modelstow.cas import Digest

from ..errors import AuthError, ConcurrentModificationError, ManifestValidationError, Problem, SourceUnavailableError
from ..hints import hint_of
from . import validation
from .listed_files import RENAME_HINT, Warn, by_index, contradiction, match, select
from .lockfile import LockedBlob, LockedModel, LockedVariant, Lockfile, absolute
from .manifest import Manifest, Model, Variant

_SIZES_AT_ONCE = 8
_T = TypeVar("_T")
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


class WithRetries(Protocol):
    """Makes a request, and repeats it while that may help."""

    def __call__(self, request: Callable[[], _T], /) -> _T: ...


def _once(request: Callable[[], _T], /) -> _T:
    return request()


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
    with_retries: WithRetries = _once,
    warn: Warn = lambda warning: None,
) -> Lockfile:
    """The lockfile for *manifest*.

    *upgrade* selects models to list again although their tables did not change. *with_retries* repeats a listing after
    every source of a model failed. *warn* is called for what is left out or cannot be vouched for.

    Raises ManifestValidationError with every problem; SourceUnavailableError or AuthError with each source and its reason;
    the errors of the prefetcher.
    """
    resolver = _Resolver(manifest, previous, registry, prefetcher, upgrade, with_retries, warn)
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
        warn: Warn,
    ) -> None:
        self._manifest, self._previous = manifest, previous
        self._registry, self._prefetcher, self._upgrade = registry, prefetcher, upgrade
        self._with_retries, self._warn = with_retries, warn
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
            components = {c: match(files, globs) for c, globs in variant.components.items()}
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
        found: list[Problem] = []
        validation.check_paths(f"{place}.files", files, found)
        self.problems += [replace(problem, what=f"{problem.what}; {RENAME_HINT}") for problem in found]
        if not files:
            self.problems.append(Problem(place, "has no files"))
        return files

    def _files_of_source(self, model: Model, variant: Variant, place: str) -> dict[str, _File]:
        source, listing = self._listing(model)
        selected = select(listing.files, variant, place, self.problems, self._warn)
        folder = absolute(listing.locator, self._base)
        locators = {listed.path: join_locator(folder, listed.path) + listed.suffix for listed in selected}
        if variant.index is not None:
            selected = self._by_index(variant, selected, locators, place)
        for listed in selected:
            if listed.error is not None:
                raise _unavailable(listed.error)
        selected = self._with_sizes(selected, locators, place)
        self._prefetch([locators[listed.path] for listed in selected if listed.sha256 is None or listed.size is None])
        files = {}
        for listed in selected:
            if listed.sha256 is None or listed.size is None:
                digest, size = self._prefetched[locators[listed.path]]
                if listed.sha256 not in (None, digest.hex):
                    what = f"the source lists {listed.path!r} with the sha256 {listed.sha256}, but it has {digest.hex}"
                    self.problems.append(Problem(place, what))
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

    def _list(self, source: str, retry: WithRetries = _once) -> Listing | SourceError:
        locator = absolute(source, self._base)
        try:
            listing = retry(lambda: self._registry.find(locator).listing(locator))
        except SourceError as error:
            return error
        # A relative source stays relative in the lockfile.
        return Listing(locator=source if listing.locator == locator else listing.locator, files=listing.files)

    def _by_index(self, variant: Variant, selected: list[Listed], locators: Mapping[str, str], place: str) -> list[Listed]:
        locator = locators.get(variant.index or "")
        if locator is None:
            self.problems.append(Problem(f"{place}.index", f"{variant.index!r} is not among the files of this variant"))
            return selected
        self._prefetch([locator])
        raw = self._prefetcher.read(self._prefetched[locator][0])
        return by_index(raw, variant, selected, place, self.problems, self._warn)

    def _with_sizes(self, selected: list[Listed], locators: Mapping[str, str], place: str) -> list[Listed]:
        """The files with the sizes that a listing of digests does not give, requested from the source."""
        unknown = [listed for listed in selected if listed.sha256 is not None and listed.size is None]
        if not unknown:
            return selected

        def size_of(listed: Listed) -> int | None:
            locator = locators[listed.path]
            return self._with_retries(lambda: self._registry.find(locator).size(locator))

        try:
            with ThreadPoolExecutor(_SIZES_AT_ONCE) as pool:
                sizes = dict(zip((listed.path for listed in unknown), pool.map(size_of, unknown), strict=True))
        except SourceError as error:
            raise _unavailable(error) from error
        for listed in unknown:
            if what := contradiction(listed.path, listed.sha256, sizes[listed.path]):
                self.problems.append(Problem(f"{place}.include", what))
        return [replace(listed, size=sizes.get(listed.path, listed.size)) for listed in selected]

    def _prefetch(self, locators: Iterable[str]) -> None:
        missing = [locator for locator in dict.fromkeys(locators) if locator not in self._prefetched]
        if not missing:
            return
        try:
            self._prefetched |= self._prefetcher.prefetch_all(missing)
        except SourceError as error:
            raise _unavailable(error) from error

    def _place(self, key: str) -> str:
        return f"models.{json.dumps(self._manifest.models[key].key)}"


def _unavailable(error: SourceError) -> SourceUnavailableError:
    """The error for one file that is wanted and cannot be had."""
    rows = [{"source": error.locator, "code": error.code, "reason": error.what}]
    kind = SourceUnavailableError
    if isinstance(error, AccessDenied):
        kind = AuthError
    elif isinstance(error, Changed):
        kind = ConcurrentModificationError
    return kind(str(error), hint=hint_of(error) or _PREFETCH_HINT, sources=rows)


def _extended(model: Model) -> set[str]:
    """The models whose variants a model extends."""
    return {text.partition("#")[0] for variant in model.variants.values() for text in variant.extends}
