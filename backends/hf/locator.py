"""``hf://[datasets/|spaces/]org/name[@revision][/folder]``: a file or folder of a hub's repository.

Locators are percent-quoted as URLs are; ``@refs%2Fpr%2F1`` is a revision with a slash, and ``main`` is meant where none
is named. What stands before ``@`` is the repository, of one segment for the oldest ones (``hf://gpt2@main/onnx``). Without
``@`` two segments are, so that ``hf://gpt2/onnx`` is the repository ``onnx`` of ``gpt2``; ``hf://gpt2`` alone is ``gpt2``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import quote, unquote

from ..errors import SourceError

_REPOSITORY = re.compile(r"hf://((?:models|datasets|spaces)/)?([^/@]+(?:/[^/@]+)?)")
_LOCATOR = re.compile(_REPOSITORY.pattern + r"(?:@(refs/(?:pr/\d+|convert/[\w.-]+)(?=/|\Z)|[^/]+))?(?:/(.*))?\Z")
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*(/[A-Za-z0-9_][A-Za-z0-9._-]*)?\Z")


@dataclass(frozen=True, slots=True, kw_only=True)
class HubPath:
    """A file or folder of a repository at a revision, nothing of it quoted."""

    kind: str  # "models/", "datasets/", "spaces/", or empty, which is models
    name: str  # of the repository
    revision: str  # a commit, branch, tag or reference
    path: str  # without a slash at either end; empty for the whole repository

    @classmethod
    def parse(cls, locator: str) -> HubPath:
        """Raises SourceError where it is no locator of a hub."""
        match = _LOCATOR.match(locator)
        kind, name, revision, path = match.groups(default="") if match else ("", "", "", "")
        path = unquote(path).rstrip("/")
        segments = path.split("/") if path else []
        if not _NAME.match(name) or any(segment in ("", ".", "..") for segment in segments):
            hint = "write hf://org/name[@revision][/folder], before it datasets/ or spaces/ where it is no model"
            raise SourceError("not a locator of a hub's repository", locator=locator, hint=hint)
        return cls(kind=kind, name=name, revision=unquote(revision) or "main", path=path)

    def __str__(self) -> str:
        """Its locator."""
        return f"hf://{self.kind}{self.name}@{quote(self.revision, safe='')}" + (
            f"/{quote(self.path)}" if self.path else ""
        )

    @property
    def page(self) -> str:
        """The repository's page, relative to the hub."""
        return self.kind.removeprefix("models/") + self.name

    @property
    def api(self) -> str:
        """The repository in the hub's API, relative to the hub."""
        return f"api/{self.kind or 'models/'}{self.name}"

    @property
    def content(self) -> str:
        """Where the file's bytes are, or are redirected from, relative to the hub."""
        return f"{self.page}/resolve/{quote(self.revision, safe='')}/{quote(self.path)}"


def repository_prefix(locator: str) -> str:
    """What of a hub's locator names the repository; empty where it is no hub's."""
    match = _REPOSITORY.match(locator)
    return match[0] if match else ""


def folder_locator(locator: str) -> str:
    """The same with its revision where a path could not follow else: one segment would be taken for an organisation."""
    match = _REPOSITORY.fullmatch(locator)
    return f"{locator}@main" if match and "/" not in match[2] else locator
