"""Upload to S3: a single PUT for a small object, a resumable multipart upload for a large one."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

from ..errors import AccessDenied, NotFound, SourceError
from ..source import OnSend, ReadRange

PART_BYTES = 8 << 20
"""Minimum size of a part, in bytes: S3 requires 5 MiB, and accepts at most 10,000 parts."""
_MAX_PARTS = 10_000


class SendRequest(Protocol):
    """A sender of single S3 requests. Raises SourceError."""

    def __call__(self, operation: str, *, arguments: Mapping[str, Any]) -> Any: ...


@dataclass(frozen=True, slots=True)
class Upload:
    """The upload of one object."""

    request: SendRequest
    bucket: str
    key: str
    read: ReadRange
    on_send: OnSend

    @property
    def _object(self) -> dict[str, str]:
        return {"Bucket": self.bucket, "Key": self.key}

    def run(self, size: int) -> int:
        """Upload *size* bytes; the number sent. Parts of an earlier upload are kept by MD5."""
        if size <= PART_BYTES:
            data = self.read(0, size)
            sha256 = base64.b64encode(hashlib.sha256(data).digest()).decode()
            self.on_send(size)
            self.request("put_object", arguments={**self._object, "Body": data, "ChecksumSHA256": sha256})
            return size
        sent: list[int] = []
        if upload := self._unfinished():
            try:
                self._upload_parts(upload, size, sent)
                return sum(sent)
            except SourceError as error:
                if error.transient or isinstance(error, AccessDenied):
                    raise
            # A concurrent upload has ended it, or its parts are of another version of zstd.
            if self._exists(size):
                return sum(sent)
        self._upload_parts(self.request("create_multipart_upload", arguments=self._object)["UploadId"], size, sent)
        return sum(sent)

    def _upload_parts(self, upload: str, size: int, sent: list[int]) -> None:
        """Upload the missing parts, appending their sizes to *sent*, and complete the upload."""
        step = PART_BYTES * -(-size // (PART_BYTES * _MAX_PARTS))
        stored = dict(self._parts(upload))

        def upload_part(number: int) -> str:
            data = self.read((number - 1) * step, min(number * step, size))
            md5 = hashlib.md5(data, usedforsecurity=False)
            if stored.get(number) == md5.hexdigest():
                return stored[number]
            self.on_send(len(data))
            part = {**self._object, "UploadId": upload, "PartNumber": number, "Body": data}
            tag: str = self.request("upload_part", arguments=part)["ETag"]
            sent.append(len(data))
            return tag

        numbers = range(1, -(-size // step) + 1)
        tags = [upload_part(number) for number in numbers]  # sequential: objects are parallel
        parts = [{"PartNumber": number, "ETag": tag} for number, tag in zip(numbers, tags, strict=True)]
        arguments = {**self._object, "UploadId": upload, "MultipartUpload": {"Parts": parts}}
        self.request("complete_multipart_upload", arguments=arguments)

    def _exists(self, size: int) -> bool:
        try:
            return bool(self.request("head_object", arguments=self._object).get("ContentLength") == size)
        except NotFound:
            return False

    def _unfinished(self) -> str:
        """The ID of the newest incomplete upload of this key; empty if none, or not supported."""
        rows: list[Any] = []
        with suppress(SourceError):
            rows = self.request("list_multipart_uploads", arguments={"Bucket": self.bucket, "Prefix": self.key}).get(
                "Uploads", []
            )
        own = [row for row in rows if row["Key"] == self.key]
        return str(max(own, key=lambda row: str(row.get("Initiated", "")))["UploadId"]) if own else ""

    def _parts(self, upload: str) -> Iterator[tuple[int, str]]:
        """Number and MD5 of each uploaded part."""
        marker = 0
        while True:
            marker_argument = {"PartNumberMarker": marker} if marker else {}
            arguments = {"Bucket": self.bucket, "Key": self.key, "UploadId": upload, **marker_argument}
            try:
                page = self.request("list_parts", arguments=arguments)
            except AccessDenied:
                raise
            except SourceError:
                return
            yield from ((row["PartNumber"], row["ETag"].strip('"')) for row in page.get("Parts", ()))
            previous, marker = marker, page.get("NextPartNumberMarker") or 0
            if not page.get("IsTruncated") or marker <= previous:
                return
