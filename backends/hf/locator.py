"""Hub locators: ``hf://[datasets/|spaces/]org/name[@revision][/folder]``.

They are percent-encoded like URLs; ``@refs%2Fpr%2F1`` is a revision with a slash, and the default
is ``main``. Before ``@`` is the repository, with a single segment for legacy ones
(``hf://gpt2@main/onnx``). Without ``@`` it has two segments, so ``hf://gpt2/onnx`` is the
repository ``onnx`` of ``gpt2``; ``hf://gpt2`` alone is ``gpt2``.
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
    """A file or folder of a repository at a revision; percent-decoded."""

    kind: str  # "models/", "datasets/", "spaces/", or empty for models
    name: str  # of the repository: "org/name", or "name" for legacy ones
    revision: str  # a commit, branch, tag or ref
    path: str  # without leading or trailing slash; empty for the whole repository

    @classmethod
    def parse(cls, locator: str) -> HubPath:
        """The path in a locator. Raises SourceError for an invalid one."""
        match = _LOCATOR.match(locator)
        kind, name, revision, path = match.groups(default="") if match else ("", "", "", "")
        path = unquote(path).rstrip("/")
        segments = path.split("/") if path else []
        if not _NAME.match(name) or any(segment in ("", ".", "..") for segment in segments):
            hint = "write hf://org/name[@revision][/folder], or hf://datasets/… or hf://spaces/… if it is not a model"
            raise SourceError("not a locator of a hub repository", locator=locator, hint=hint)
        return cls(kind=kind, name=name, revision=unquote(revision) or "main", path=path)

    def __str__(self) -> str:
        """The canonical locator."""
        return f"hf://{self.kind}{self.name}@{quote(self.revision, safe='')}" + (
            f"/{quote(self.path)}" if self.path else ""
        )

    @property
    def page(self) -> str:
        """URL path of the repository's web page."""
        return self.kind.removeprefix("models/") + self.name

    @property
    def api(self) -> str:
        """URL path of the repository in the API."""
        return f"api/{self.kind or 'models/'}{self.name}"

    @property
    def content(self) -> str:
        """URL path of the file's content, which may redirect."""
        return f"{self.page}/resolve/{quote(self.revision, safe='')}/{quote(self.path)}"


def repository_prefix(locator: str) -> str:
    """The part of a hub locator that names the repository; empty if it is not a hub locator."""
    match = _REPOSITORY.match(locator)
    return match[0] if match else ""


def folder_locator(locator: str) -> str:
    """The locator, with ``@main`` if it has one segment only and no revision.

    Otherwise, with a path appended, the segment would be taken for an organisation.
    """
    match = _REPOSITORY.fullmatch(locator)
    return f"{locator}@main" if match and "/" not in match[2] else locator
