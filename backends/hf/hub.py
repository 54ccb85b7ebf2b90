"""The client of a model hub: ``hf://…`` by the web API of Hugging Face.

A listing is pinned to the current commit of the revision. Files in LFS are listed with their
sha256; for others the API reports only the git blob hash, which is not a digest of the content.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

from .. import environment
from ..errors import AccessDenied, NotFound, NotListable, Offline, ProtocolError, SourceError, redact
from ..http.client import HttpSource
from ..source import Body, Listed, Listing
from .locator import HubPath

_COMMIT = re.compile(r"[0-9a-f]{40}\Z")
_LISTING_BYTES = 256 << 20  # of all pages together
_PAGES = 10_000
_ENDPOINT_HINT = "check that HF_ENDPOINT is the address of a hub, or unset it"


class HubSource:
    """The repositories of one hub: that of ``HF_ENDPOINT``, or huggingface.co.

    The token is sent to no other host.

    The hub redirects to signed URLs. Range requests go straight to the cached target for five
    minutes; one that is refused is resolved again.
    """

    network = True

    def __init__(self, environ: Mapping[str, str] | None = None) -> None:
        """Raises SourceError if ``HF_ENDPOINT`` is invalid."""
        self._environ = os.environ if environ is None else environ
        self._endpoint = _endpoint(self._environ.get("HF_ENDPOINT", ""))
        self._host = environment.origin(self._endpoint)
        self._http = HttpSource(self._environ, token=self._token)

    def open(self, locator: str, *, start: int = 0, stop: int | None = None) -> Body:
        hub_path = self._parse(locator)
        with self._hub_errors(hub_path, locator):
            try:
                return self._http.open(f"{self._endpoint}/{hub_path.content}", start=start, stop=stop)
            except NotFound as error:
                if error.reason != "RevisionNotFound" or not _COMMIT.match(hub_path.revision):
                    raise
                # A force-push removed the pinned commit. Its files are mostly still on the branch;
                # the caller's digest decides whether they are the same bytes.
                main = replace(hub_path, revision="main")
                return self._http.open(f"{self._endpoint}/{main.content}", start=start, stop=stop)

    def size(self, locator: str) -> int | None:
        # By GET, since a signed redirect target may be valid for no other method.
        body = self.open(locator, start=0, stop=1)
        body.close()
        return body.total

    def listing(self, locator: str) -> Listing:
        hub_path = self._parse(locator)
        with self._hub_errors(hub_path, locator):
            pinned = replace(hub_path, revision=self._commit(hub_path, locator))
            return Listing(locator=str(pinned), files=tuple(self._files(pinned, locator)))

    def origin(self, locator: str) -> str:
        return self._endpoint

    def _parse(self, locator: str) -> HubPath:
        if environment.env_flag(self._environ, "HF_HUB_OFFLINE"):
            what, hint = "no request was sent, because HF_HUB_OFFLINE is set", "unset HF_HUB_OFFLINE"
            raise Offline(what, locator=locator, hint=hint, reason="HubOffline")
        return HubPath.parse(locator)

    def _token(self, url: str) -> str | None:
        return find_token(self._environ) if environment.origin(url) == self._host else None

    # ---- listing

    def _commit(self, hub_path: HubPath, locator: str) -> str:
        url = f"{self._endpoint}/{hub_path.api}/revision/{quote(hub_path.revision, safe='')}"
        document, _, _ = self._page(url, _LISTING_BYTES, locator)
        commit = document.get("sha") if isinstance(document, dict) else None
        if not isinstance(commit, str) or not _COMMIT.match(commit):
            raise ProtocolError("the hub's response names no commit", locator=locator, hint=_ENDPOINT_HINT)
        return commit

    def _files(self, pinned: HubPath, locator: str) -> Iterator[Listed]:
        folder = f"/{quote(pinned.path, safe='')}" if pinned.path else ""
        url = f"{self._endpoint}/{pinned.api}/tree/{pinned.revision}{folder}?recursive=true&expand=false"
        remaining = _LISTING_BYTES
        for _ in range(_PAGES):
            rows, length, url = self._page(url, remaining, locator)
            remaining -= length
            if not isinstance(rows, list):
                raise ProtocolError("the hub's response is not a listing", locator=locator, hint=_ENDPOINT_HINT)
            for row in rows:
                if (listed := _parse_row(row, pinned.path, locator)) is not None:
                    yield listed
            if not url:
                return
            if _origin(url) != self._host:
                raise ProtocolError(f"the listing continues at another address, {redact(url)}", locator=locator)
        what, hint = f"the listing has more than {_PAGES:,} pages", "name a folder of the repository"
        raise NotListable(what, locator=locator, hint=hint)

    def _page(self, url: str, at_most: int, locator: str) -> tuple[Any, int, str]:
        """One JSON response of the API, its length in bytes, and the URL of the next page."""
        try:
            raw, next_url = self._http.page(url, at_most=at_most)
            return json.loads(raw), len(raw), next_url
        except (ValueError, RecursionError) as error:
            raise ProtocolError(
                "the hub's response is too long, or not JSON", locator=locator, hint=_ENDPOINT_HINT
            ) from error

    # ---- errors

    @contextmanager
    def _hub_errors(self, hub_path: HubPath, locator: str) -> Iterator[None]:
        """Rewrite errors in terms of the hub and of the original locator."""
        try:
            yield
        except SourceError as error:
            page, has_token = f"{self._endpoint}/{hub_path.page}", find_token(self._environ) is not None
            what, hint = _describe(error, hub_path, page, has_token=has_token)
            raise type(error)(
                what,
                locator=locator,
                hint=hint,
                retry_after=error.retry_after,
                reason=error.reason,
                status=error.status,
            ) from error


def find_token(environ: Mapping[str, str]) -> str | None:
    """The token from ``HF_TOKEN``, else from the file of ``hf auth login``; None if absent."""
    home = environ.get("HOME", "")
    cache = environ.get("XDG_CACHE_HOME") or f"{home}/.cache"
    folder = environ.get("HF_HOME") or f"{cache}/huggingface"
    path = environ.get("HF_TOKEN_PATH") or f"{folder}/token"
    text = environ.get("HF_TOKEN") or environ.get("HUGGING_FACE_HUB_TOKEN") or ""
    if not text.strip():
        try:
            text = Path(home + path[1:] if path.startswith("~/") else path).read_text(errors="replace")
        except OSError:
            return None
    return "".join(text.split()) or None


def _endpoint(text: str) -> str:
    endpoint = text.strip().rstrip("/") or "https://huggingface.co"
    scheme, host, _ = _origin(endpoint)
    if scheme not in ("http", "https") or not host or re.search(r"[@?#\s]", endpoint):
        hint = "write it as https://hub.example.org, and put credentials into HF_TOKEN"
        raise SourceError("HF_ENDPOINT is not the address of a hub", locator=redact(endpoint), hint=hint)
    return endpoint


def _origin(url: str) -> tuple[str, str, int]:
    try:
        return environment.origin(url)
    except ValueError:  # an invalid port
        return "", "", 0


def _parse_row(row: Any, folder: str, locator: str) -> Listed | None:
    """A row of a tree listing; None if not a file. The caller validates path and digest."""
    if not isinstance(row, dict):
        raise ProtocolError("the hub's response is not a listing", locator=locator)
    if row.get("type") != "file":
        return None
    path, lfs = row.get("path"), row.get("lfs")
    size, sha256 = (lfs.get("size"), lfs.get("oid")) if isinstance(lfs, dict) else (row.get("size"), None)
    if not isinstance(path, str) or type(size) is not int or (lfs is not None and not isinstance(sha256, str)):
        what = f"the hub lists {path[:80]!a}" if isinstance(path, str) else "the hub lists a file without a path"
        raise ProtocolError(f"{what} with an invalid size or sha256", locator=locator)
    below = f"{folder}/" if folder else ""
    if not path.startswith(below):
        raise ProtocolError(f"the hub lists {path[:80]!a}, which is not below {folder[:80]!a}", locator=locator)
    return Listed(path=path.removeprefix(below), size=size, sha256=sha256)


def _describe(error: SourceError, hub_path: HubPath, page: str, *, has_token: bool) -> tuple[str, str]:
    """Message and hint for an error of the hub."""
    if error.reason == "GatedRepo":
        hint = f"request access at {page}, then set HF_TOKEN" + (" to a token that has it" if has_token else "")
        return f"{hub_path.name} is gated ({error.what})", hint
    if isinstance(error, AccessDenied) and error.status != 401:
        hint = f"look at {page} for the reason, and check what the token (HF_TOKEN, or that of `hf auth login`) may read"
        return f"the hub refuses ({error.what})", hint
    if isinstance(error, AccessDenied) and not has_token:
        hint = "check the name; for a private repository set HF_TOKEN or run `hf auth login`"
        return f"{hub_path.name} is private, or there is no such repository ({error.what})", hint
    if isinstance(error, AccessDenied):
        hint = "check the name, and that the token (HF_TOKEN, or that of `hf auth login`) is valid and may read it"
        return f"the token may not read {hub_path.name}, or there is no such repository ({error.what})", hint
    if error.reason == "RepoNotFound":
        return f"the hub has no {hub_path.name}, or none that it shows to this token", f"check the name, or look at {page}"
    if error.reason == "RevisionNotFound":
        return f"{hub_path.name} has no revision {hub_path.revision!r}", f"look for branches and tags at {page}"
    if error.reason == "EntryNotFound":
        return f"{hub_path.name} has no such file or folder at {hub_path.revision}", ""
    return error.what, error.hint
