"""A model hub on loopback, as huggingface_hub knows one: an API, files of git, and LFS files on a CDN at another port."""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

from origin import Origin, Seen

Content = bytes | Path
Answer = tuple[int, Mapping[str, str], Content]

_API = re.compile(r"/api/(models|datasets|spaces)/(.+?)(?:/(revision|tree)/([^/]+)(?:/(.*))?)?\Z")
_RESOLVE = re.compile(r"/(datasets/|spaces/)?(.+?)/resolve/([^/]+)/(.+)\Z")
CANARY = "canary"
"""In every signature, to be looked for in what is printed and kept."""


@dataclass
class Repository:
    """``commits`` has the files of every commit by path, ``branches`` the commit of every branch and tag."""

    lfs: tuple[str, ...] = ("*.safetensors", "*.bin")  # patterns of paths that are kept as LFS
    gated: bool = False  # everyone may list it, only some may read it
    private: bool = False
    commits: dict[str, dict[str, Content]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, files: Mapping[str, Content], branch: str = "main", name: str = "") -> str:
        """Make these the files of a branch; the commit's name."""
        name = name or hashlib.sha1(f"{branch} {len(self.commits)}".encode()).hexdigest()
        self.commits[name] = dict(files)
        self.branches[branch] = name
        return name

    def is_lfs(self, path: str) -> bool:
        return any(fnmatch(path, pattern) for pattern in self.lfs)


class Cdn(Origin):
    """Serves LFS files by digest to requests with a valid signature, ``uses`` times for each; None: until ``expire``."""

    def __init__(self) -> None:
        super().__init__(listing="none")
        self.uses: int | None = None
        self._left: dict[str, int | None] = {}
        self._signed = 0

    def sign(self, digest: str, content: Content) -> str:
        """A fresh address of a file."""
        self.objects[f"lfs/{digest}"] = content
        with self._mutex:
            self._signed += 1
            signature = f"{CANARY}-{self._signed}"
            self._left[signature] = self.uses
        return f"{self.url}/lfs/{digest}?X-Amz-Expires=3600&Signature={signature}"

    def expire(self) -> None:
        """No signature that was given until now is good any more."""
        with self._mutex:
            self._left.clear()

    def answer(self, seen: Seen) -> Answer | None:
        signature = parse_qs(urlsplit(seen.target).query).get("Signature", [""])[0]
        with self._mutex:
            left = self._left.get(signature, 0)
            if left == 0:
                return 403, {}, b""
            self._left[signature] = left and left - 1
        return None


class Hub(Origin):
    """``repositories`` by name: "org/name", "datasets/org/name". ``tokens`` says which of the closed ones a token opens.

    ``moved`` maps old names to new ones. ``page`` is how many files one answer lists. ``edit`` changes a listing.
    """

    def __init__(self) -> None:
        super().__init__(listing="none")
        self.cdn = Cdn()
        self.repositories: dict[str, Repository] = {}
        self.tokens: dict[str, set[str]] = {}
        self.moved: dict[str, str] = {}
        self.page = 1000
        self.edit: Callable[[list[dict[str, object]]], object] = lambda rows: rows
        self.next_link = ""  # instead of the right one

    def __enter__(self) -> Hub:
        self.cdn.__enter__()
        super().__enter__()
        return self

    def stop(self) -> None:
        self.cdn.stop()
        super().stop()

    def add(self, name: str, files: Mapping[str, Content], **options: object) -> Repository:
        """A repository with these files at main."""
        repository = self.repositories[name] = Repository(**options)  # type: ignore[arg-type]
        repository.commit(files)
        return repository

    def answer(self, seen: Seen) -> Answer | None:
        target = urlsplit(seen.target)
        if match := _API.match(target.path):
            kind, name, what, revision, path = match.groups(default="")
            name = name if kind == "models" else f"{kind}/{name}"
        elif match := _RESOLVE.match(target.path):
            prefix, name, revision, path = match.groups(default="")
            name, what = prefix + name, "resolve"
        else:
            return 404, {}, b""
        if name in self.moved:
            return 307, {"Location": seen.target.replace(name, self.moved[name], 1)}, b""
        token = (authorization(seen) or "").removeprefix("Bearer ")
        if refusal := self._refusal(name, token, reading=what == "resolve"):
            return refusal
        repository = self.repositories[name]
        revision = unquote(revision) or "main"
        commit = revision if revision in repository.commits else repository.branches.get(revision, "")
        if not commit:
            return 404, {"X-Error-Code": "RevisionNotFound"}, b""
        if what == "resolve":
            return self._content(repository, commit, unquote(path))
        if what == "tree":
            return self._tree(repository, commit, unquote(path), seen)
        siblings = [{"rfilename": path} for path in repository.commits[commit]]
        info = {"_id": "0", "id": name, "modelId": name, "sha": commit, "private": repository.private, "siblings": siblings}
        return 200, {"Content-Type": "application/json"}, json.dumps(info).encode()

    def _refusal(self, name: str, token: str, *, reading: bool) -> Answer | None:
        """The hub does not reveal to the unauthorised whether something private exists."""
        repository = self.repositories.get(name)
        if token and token not in self.tokens:
            return 401, {"X-Error-Message": "Invalid credentials in Authorization header"}, b""
        opens = name in self.tokens.get(token, ())
        if repository is None or (repository.private and not opens):
            if token:
                return 404, {"X-Error-Code": "RepoNotFound"}, b""
            return 401, {"X-Error-Message": "Invalid username or password."}, b""
        if repository.gated and reading and not opens:
            return 403 if token else 401, {"X-Error-Code": "GatedRepo"}, b""
        return None

    def _tree(self, repository: Repository, commit: str, folder: str, seen: Seen) -> Answer:
        below = f"{folder}/" if folder else ""
        files = {path: content for path, content in repository.commits[commit].items() if path.startswith(below)}
        if not files and folder:
            return 404, {"X-Error-Code": "EntryNotFound"}, b""
        folders = sorted({path.rpartition("/")[0] for path in files if "/" in path} - {folder})
        rows: list[dict[str, object]] = [
            {"type": "directory", "path": path, "size": 0, "oid": "0" * 40} for path in folders
        ]
        rows += [_row(path, content, repository.is_lfs(path)) for path, content in sorted(files.items())]
        start = int(parse_qs(urlsplit(seen.target).query).get("cursor", ["0"])[0])
        shown = self.edit(rows[start : start + self.page])
        headers = {"Content-Type": "application/json"}
        if start + self.page < len(rows):
            address = f"{self.url}{seen.target.partition('?')[0]}?recursive=true&expand=false&cursor={start + self.page}"
            headers["Link"] = f'<{self.next_link or address}>; rel="next"'
        return 200, headers, json.dumps(shown).encode()

    def _content(self, repository: Repository, commit: str, path: str) -> Answer:
        content = repository.commits[commit].get(path)
        if content is None:
            return 404, {"X-Error-Code": "EntryNotFound"}, b""
        if not repository.is_lfs(path):
            return 200, {"X-Repo-Commit": commit, "ETag": f'"{_git_oid(content)}"'}, content
        digest, size = sha256_of(content), _size(content)
        linked = {"X-Repo-Commit": commit, "X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(size)}
        return 302, {**linked, "Location": self.cdn.sign(digest, content)}, b""


def address_of(name: str, path: str, revision: str = "main") -> str:
    """The path at the hub from which a file is read, as the log of requests has it."""
    return f"{name}/resolve/{unquote(revision)}/{path}"


def authorization(seen: Seen) -> str | None:
    """The credentials of a request, however it writes the header's name."""
    return next((value for name, value in seen.headers.items() if name.lower() == "authorization"), None)


@functools.lru_cache
def sha256_of(content: Content) -> str:
    """Hex digest of a file's content."""
    if isinstance(content, bytes):
        return hashlib.sha256(content).hexdigest()
    with open(content, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _git_oid(content: Content) -> str:
    data = content if isinstance(content, bytes) else content.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _size(content: Content) -> int:
    return len(content) if isinstance(content, bytes) else content.stat().st_size


def _row(path: str, content: Content, is_lfs: bool) -> dict[str, object]:
    row: dict[str, object] = {"type": "file", "path": path, "size": _size(content)}
    if is_lfs:
        lfs = {"oid": sha256_of(content), "size": _size(content), "pointerSize": 134}
        return {**row, "oid": "0" * 40, "lfs": lfs}
    return {**row, "oid": _git_oid(content)}
