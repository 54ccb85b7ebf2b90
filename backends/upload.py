"""Putting one object into a bucket: a small one at once, a large one in parts that an interrupted upload leaves behind."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

from .base import Reader
from .errors import Denied, SourceError

PART = 8 << 20
"""Bytes of a part, and the least: S3 asks for 5 MiB, and takes 10,000 parts at most."""
_MOST_PARTS = 10_000
_AT_ONCE = 1  # several objects are put at once already, by whoever counts connections


class Ask(Protocol):
    """One request to S3. Raises SourceError."""

    def __call__(self, operation: str, *, arguments: Mapping[str, Any]) -> Any: ...


@dataclass(frozen=True, slots=True)
class Upload:
    """One key of one bucket."""

    ask: Ask
    bucket: str
    key: str

    def put(self, size: int, read: Reader) -> int:
        """See ``Target.put``."""
        where = {"Bucket": self.bucket, "Key": self.key}
        if size <= PART:
            data = read(0, size)
            sha256 = base64.b64encode(hashlib.sha256(data).digest()).decode()
            self.ask("put_object", arguments={**where, "Body": data, "ChecksumSHA256": sha256})
            return size
        step = PART * -(-size // (PART * _MOST_PARTS))
        upload = self._unfinished() or self.ask("create_multipart_upload", arguments=where)["UploadId"]
        there = dict(self._parts(upload))

        def one(number: int) -> tuple[str, int]:
            data = read((number - 1) * step, min(number * step, size))
            md5 = hashlib.md5(data, usedforsecurity=False)
            if there.get(number) == md5.hexdigest():
                return there[number], 0
            part = {**where, "UploadId": upload, "PartNumber": number, "Body": data}
            return self.ask("upload_part", arguments=part)["ETag"], len(data)

        numbers = range(1, -(-size // step) + 1)
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            try:
                done = list(pool.map(one, numbers))
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        parts = [{"PartNumber": number, "ETag": tag} for number, (tag, _) in zip(numbers, done, strict=True)]
        self.ask("complete_multipart_upload", arguments={**where, "UploadId": upload, "MultipartUpload": {"Parts": parts}})
        return sum(sent for _, sent in done)

    def _unfinished(self) -> str:
        """The newest upload of this key that did not end; empty where there is none, or the server cannot say."""
        rows: list[Any] = []
        with suppress(SourceError):
            rows = self.ask("list_multipart_uploads", arguments={"Bucket": self.bucket, "Prefix": self.key}).get(
                "Uploads", []
            )
        mine = [row for row in rows if row["Key"] == self.key]
        return str(max(mine, key=lambda row: str(row.get("Initiated", "")))["UploadId"]) if mine else ""

    def _parts(self, upload: str) -> Iterator[tuple[int, str]]:
        """Number and md5 of each part that was sent."""
        marker = 0
        while True:
            more = {"PartNumberMarker": marker} if marker else {}
            arguments = {"Bucket": self.bucket, "Key": self.key, "UploadId": upload, **more}
            try:
                page = self.ask("list_parts", arguments=arguments)
            except Denied:
                raise
            except SourceError:
                return
            yield from ((row["PartNumber"], row["ETag"].strip('"')) for row in page.get("Parts", ()))
            before, marker = marker, page.get("NextPartNumberMarker") or 0
            if not page.get("IsTruncated") or marker <= before:
                return
