"""The least of a model hub that ``huggingface_hub`` downloads from and verifies against: one repository, one revision.

Every file of the served folder is an LFS file whose name there is its sha256.
"""

from __future__ import annotations

import functools
import hashlib
import json
import sys
from pathlib import Path
from urllib.parse import unquote, urlsplit

from .servers import FileHandler, serve

REPOSITORY = "bench/model"
COMMIT = "c0ffee" + "0" * 34


@functools.cache
def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class HubHandler(FileHandler):
    """Answers what a client asks about ``REPOSITORY`` at any revision; everything else is 404."""

    def answer(self, *, body: bool) -> None:
        """Answer one request."""
        path = unquote(urlsplit(self.path).path)
        name = path.rpartition("/")[2]
        if path.startswith(f"/api/models/{REPOSITORY}/tree/"):
            self.send_text(json.dumps(self._tree()), "application/json", body=body)
        elif path == f"/api/models/{REPOSITORY}" or path.startswith(f"/api/models/{REPOSITORY}/revision/"):
            self.send_text(json.dumps(self._info()), "application/json", body=body)
        elif path.startswith(f"/{REPOSITORY}/resolve/") and (self.folder / name).is_file():
            self.send_file(self.folder / name, self._headers(self.folder / name), body=body)
        else:
            self.send_error(404)

    def _files(self) -> list[Path]:
        return sorted(path for path in self.folder.iterdir() if path.is_file())

    def _info(self) -> dict[str, object]:
        siblings = [{"rfilename": path.name} for path in self._files()]
        return {"_id": "0", "id": REPOSITORY, "modelId": REPOSITORY, "sha": COMMIT, "private": False, "siblings": siblings}

    def _tree(self) -> list[dict[str, object]]:
        rows: list[dict[str, object]] = []
        for path in self._files():
            size = path.stat().st_size
            lfs = {"oid": _sha256(path), "size": size, "pointerSize": 134}
            rows.append({"type": "file", "path": path.name, "size": size, "oid": "0" * 40, "lfs": lfs})
        return rows

    def _headers(self, path: Path) -> dict[str, str]:
        etag = f'"{_sha256(path)}"'
        size = str(path.stat().st_size)
        return {"X-Repo-Commit": COMMIT, "ETag": etag, "X-Linked-Etag": etag, "X-Linked-Size": size}


if __name__ == "__main__":
    serve(HubHandler, Path(sys.argv[1]))
