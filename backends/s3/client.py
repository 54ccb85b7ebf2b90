"""The S3 client: ``s3://bucket/prefix`` on any S3-compatible server, by boto3.

Credentials, profiles, endpoints and regions are found by boto3's own chain. Locators are written
as for `aws s3`: after the bucket comes the raw key, without percent-encoding. A listing appends
``?versionId=…``, so that exactly the listed version is fetched.
"""

from __future__ import annotations

import base64
import os
import re
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from threading import Lock
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, unquote

from ..environment import env_flag
from ..errors import AccessDenied, ConnectionFailed, NotFound, NotListable, ProtocolError, SourceError, Throttled, TimedOut
from ..http.response import CONNECTION_ERRORS, make_body, parse_content_range, parse_retry_after, satisfies_range
from ..source import Body, Listed, Listing, OnSend, ReadRange
from .multipart import Upload

if TYPE_CHECKING:
    from botocore.client import BaseClient

CONNECT_TIMEOUT_S = 10.0
READ_TIMEOUT_S = 60.0
METADATA_TIMEOUT_S = 0.5
"""Seconds to wait for instance metadata, unless the user sets a timeout."""
_MAX_CONNECTIONS = 64
_PARALLEL_HEADS = 32  # concurrent HEAD requests of a listing
_MAX_PAGES = 10_000
_LOCATOR = re.compile(r"[sS]3://(?P<bucket>[^/?#@]+)(?:/(?P<key>.*?))?(?:\?versionId=(?P<version>[^?&/]+))?", re.DOTALL)

_NOT_FOUND = {"NoSuchKey", "NoSuchBucket", "NoSuchVersion", "NotFound"}
_THROTTLED = {"SlowDown", "Throttling", "ThrottlingException", "RequestLimitExceeded", "ServiceUnavailable"}
_EXPIRED = "log in again, or renew AWS_SESSION_TOKEN: the session has expired"
_ACCESS_DENIED = {  # error codes that S3 also sends with a status other than 401 or 403
    "AccessDenied": "they do not permit this: s3:GetObject is needed, and s3:ListBucket for listings",
    "AllAccessDisabled": "",
    "AuthorizationHeaderMalformed": "check AWS_DEFAULT_REGION",
    "CredentialsNotSupported": "",
    "ExpiredToken": _EXPIRED,
    "InvalidAccessKeyId": "this server does not know AWS_ACCESS_KEY_ID; check it and the endpoint",
    "InvalidClientTokenId": "AWS_ACCESS_KEY_ID is unknown; check it and the endpoint",
    "InvalidSecurity": "",
    "InvalidToken": _EXPIRED,
    "RequestExpired": "set this machine's clock",
    "RequestTimeTooSkewed": "set this machine's clock",
    "SignatureDoesNotMatch": "AWS_SECRET_ACCESS_KEY does not match AWS_ACCESS_KEY_ID",
    "TokenRefreshRequired": _EXPIRED,
}
_CREDENTIALS_HINT = "set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"


class _OutOfRange(SourceError):
    """A range that starts beyond the end of the object."""


class S3Source:
    """The objects of S3 buckets. Botocore's retries are off, since retries are the caller's.

    Without credentials, requests are unsigned: public buckets serve them, others deny access. The
    environment and the profiles are read once, on the first request.
    """

    network = True
    page_size = 1000
    """Keys per page of a listing; the maximum of S3."""

    def __init__(self) -> None:
        self._boto_client: BaseClient | None = None
        self._unsigned = ""  # the reason for unsigned requests, if they are
        self._mutex = Lock()

    def open(self, locator: str, *, start: int = 0, stop: int | None = None) -> Body:
        range_requested = bool(start or stop)
        arguments = _arguments(locator)
        try:
            span = {"Range": f"bytes={start}-{'' if stop is None else stop - 1}"} if range_requested else {}
            response = self._request("get_object", locator, arguments | span)
            status = response["ResponseMetadata"]["HTTPStatusCode"]
            if range_requested and not satisfies_range(status, response.get("ContentRange"), start):
                response["Body"].close()
                raise _OutOfRange("another range was sent", locator=locator)
        except _OutOfRange:
            # The object is not the expected one. Request all of it; the reader compares the length.
            response = self._request("get_object", locator, arguments)
        return self._body(response, locator, range_requested=range_requested)

    def size(self, locator: str) -> int | None:
        try:
            size: int | None = self._request("head_object", locator, _arguments(locator)).get("ContentLength")
            return size
        except SourceError as error:
            if error.transient or isinstance(error, NotFound):
                raise
        # A response to HEAD has no body, so no error code; one to GET has.
        body = self.open(locator)
        body.close()
        return body.total

    def listing(self, locator: str) -> Listing:
        bucket, key, _ = _parts(locator)
        prefix = key.rstrip("/") + "/" if key else ""  # t2v/ is not t2v-other
        keys = list(self._keys(bucket, prefix, locator))
        if not keys:
            raise NotFound(
                "no object has this prefix", locator=locator, hint="check the bucket, the prefix and the endpoint"
            )
        with ThreadPoolExecutor(_PARALLEL_HEADS) as pool:
            files = tuple(pool.map(lambda row: self._listed(bucket, prefix, *row), keys))
        return Listing(locator=locator, files=files)

    def origin(self, locator: str) -> str:
        return f"s3://{_parts(locator)[0]}"

    def put(self, locator: str, size: int, read: ReadRange, on_send: OnSend) -> int:
        bucket, key, _ = _parts(locator)
        return Upload(partial(self._request, locator=locator), bucket, key, read, on_send).run(size)

    # ---- listing

    def _keys(self, bucket: str, prefix: str, locator: str) -> Iterator[tuple[str, int | None]]:
        token = ""
        for _ in range(_MAX_PAGES):
            more = {"ContinuationToken": token} if token else {}
            page = self._request(
                "list_objects_v2", locator, {"Bucket": bucket, "Prefix": prefix, "MaxKeys": self.page_size, **more}
            )
            for row in page.get("Contents", ()):
                key = row.get("Key", "")
                if key.startswith(prefix) and not key.endswith("/"):  # consoles create such folders
                    yield key, row.get("Size")
            if not page.get("IsTruncated"):
                return
            before, token = token, page.get("NextContinuationToken", "")
            if token in ("", before):
                raise ProtocolError("the listing is truncated, without a continuation token", locator=locator)
        raise NotListable(f"more than {_MAX_PAGES} pages", locator=locator, hint="name a longer prefix")

    def _listed(self, bucket: str, prefix: str, key: str, size: int | None) -> Listed:
        """A file of a listing with its version, and its sha256 if S3 stores a full-object checksum.

        Pages of keys contain neither, so each object costs one HEAD. That saves downloading it.
        """
        locator = f"s3://{bucket}/{key}"
        try:
            head = self._request("head_object", locator, {"Bucket": bucket, "Key": key, "ChecksumMode": "ENABLED"})
        except SourceError as error:
            if error.transient:
                raise
            head = {}  # the file may not be needed; if it is, GET reports a better error
        version = head.get("VersionId", "null")
        suffix = "" if version == "null" else f"?versionId={quote(version, safe='')}"
        size = head.get("ContentLength", size)  # of the same version as the checksum
        return Listed(path=key[len(prefix) :], size=size, sha256=_sha256(head), suffix=suffix)

    # ---- requests

    def _body(self, response: Mapping[str, Any], locator: str, *, range_requested: bool) -> Body:
        # The object is the stored bytes, whatever its Content-Encoding: nothing is decoded. Under
        # botocore's stream, which would add a length check, is a urllib3 response.
        raw = getattr(response["Body"], "_raw_stream", response["Body"])
        content_range, length = response.get("ContentRange"), response.get("ContentLength")
        ranged = not range_requested or parse_content_range(content_range) is not None
        version = str(response.get("VersionId", "null"))
        version = version if version != "null" else str(response.get("ETag", ""))
        return make_body(
            raw, content_range, length, lambda error: self._source_error(error, locator), ranged=ranged, version=version
        )

    def _request(self, operation: str, locator: str, arguments: Mapping[str, Any]) -> Any:
        try:
            return getattr(self._client(), operation)(**arguments)
        except Exception as error:
            raise self._source_error(error, locator) from error

    def _client(self) -> BaseClient:
        with self._mutex:
            if self._boto_client is None:
                self._boto_client, self._unsigned = _make()
            return self._boto_client

    def _source_error(self, error: Exception, locator: str) -> SourceError:
        from botocore.exceptions import ClientError

        if isinstance(error, ClientError):
            return _response_error(error.response, locator, self._unsigned)
        return _request_error(error, locator)


def _session() -> Any:
    """A boto3 session that does not wait long for instance metadata."""
    import boto3.session  # with a client 0.25 s: only for s3://
    import botocore.session
    from botocore.configprovider import ConstantProvider

    inner = botocore.session.get_session()
    if inner.get_config_variable("metadata_service_timeout") == 1:  # the default; tried twice
        timeout = ConstantProvider(METADATA_TIMEOUT_S)
        inner.get_component("config_store").set_config_provider("metadata_service_timeout", timeout)
    return boto3.session.Session(botocore_session=inner)


def _make() -> tuple[BaseClient, str]:
    """A boto3 client, and why its requests are unsigned. boto3 finds the endpoint."""
    session = _session()
    unsigned = ""
    if env_flag(os.environ, "AWS_NO_SIGN_REQUEST"):
        unsigned = "AWS_NO_SIGN_REQUEST is set, and this is not public"
    elif session.get_credentials() is None:
        unsigned = f"no credentials were found; {_CREDENTIALS_HINT}"

    import botocore
    from botocore.config import Config

    config = Config(
        connect_timeout=CONNECT_TIMEOUT_S,
        read_timeout=READ_TIMEOUT_S,
        retries={"total_max_attempts": 1, "mode": "standard"},
        max_pool_connections=_MAX_CONNECTIONS,
        signature_version=botocore.UNSIGNED if unsigned else None,
        response_checksum_validation="when_required",  # the caller verifies the digest
        request_checksum_calculation="when_required",  # older servers reject the trailers
    )
    region = session.region_name or os.environ.get("AWS_REGION") or "us-east-1"
    return session.client("s3", config=config, region_name=region), unsigned


def _parts(locator: str) -> tuple[str, str, str]:
    """Bucket, key and version id of a locator. Raises SourceError."""
    match = _LOCATOR.fullmatch(locator)
    if match is None:
        raise SourceError("an s3:// locator names a bucket", locator=locator, hint="write s3://bucket/prefix")
    return match["bucket"], match["key"] or "", unquote(match["version"] or "")


def _arguments(locator: str) -> dict[str, Any]:
    bucket, key, version = _parts(locator)
    return {"Bucket": bucket, "Key": key} | ({"VersionId": version} if version else {})


def _sha256(head: Mapping[str, Any]) -> str | None:
    """The content's sha256 in hex; None for a multipart upload's checksum of checksums."""
    text, kind = head.get("ChecksumSHA256", ""), head.get("ChecksumType")
    if kind is None:  # older servers: a multipart upload has -<parts> in its ETag
        kind = "COMPOSITE" if "-" in head.get("ETag", "-") else "FULL_OBJECT"
    if kind != "FULL_OBJECT" or not re.fullmatch("[A-Za-z0-9+/]{43}=", text):
        return None
    return base64.b64decode(text).hex()


def _response_error(response: Mapping[str, Any], locator: str, unsigned: str) -> SourceError:
    """The SourceError for an error response."""
    status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    code = re.sub(r"[^\w.-]", "", str(response.get("Error", {}).get("Code", "")))[:60] or str(status)
    after = parse_retry_after(response.get("ResponseMetadata", {}).get("HTTPHeaders", {}).get("retry-after", ""))
    if code == "InvalidObjectState":
        return SourceError("the object is archived", locator=locator, hint="restore it from its storage class first")
    # Some servers treat an unsigned request as malformed rather than forbidden.
    if code in _ACCESS_DENIED or status in (401, 403, 407) or (unsigned and status == 400):
        hint = unsigned or f"check the credentials ({_ACCESS_DENIED.get(code) or _CREDENTIALS_HINT})"
        return AccessDenied(
            f"S3 refused ({code})" + ", requested without credentials" * bool(unsigned), locator=locator, hint=hint
        )
    if status == 416:
        return _OutOfRange(f"S3 refused ({code})", locator=locator)
    if code in _NOT_FOUND or status == 404:
        return NotFound(f"not found on S3 ({code})", locator=locator)
    if code in _THROTTLED or status in (429, 503):
        return Throttled(f"S3 asks to slow down ({code})", locator=locator, retry_after=after)
    if code == "RequestTimeout" or status in (408, 504):
        return TimedOut(f"S3 timed out ({code})", locator=locator)
    if status >= 500 and status != 501:
        return ConnectionFailed(f"S3 failed ({code})", locator=locator, retry_after=after)
    return SourceError(f"S3 refused ({code})", locator=locator)


def _request_error(error: Exception, locator: str) -> SourceError:
    """The SourceError for a request without response.

    Few library messages are kept, since they may contain secrets.
    """
    from botocore import exceptions as botocore
    from urllib3 import exceptions as urllib3

    with_message = (
        botocore.NoCredentialsError,
        botocore.PartialCredentialsError,
        botocore.ProfileNotFound,
        botocore.UnauthorizedSSOTokenError,
    )
    without_message = (
        botocore.CredentialRetrievalError,
        botocore.NoAuthTokenError,
        botocore.RefreshWithMFAUnsupportedError,
        botocore.SSOError,
        botocore.TokenRetrievalError,
        botocore.UnknownCredentialError,
        getattr(botocore, "LoginError", botocore.SSOError),  # in later versions
    )
    name = type(error).__name__
    if isinstance(error, with_message + without_message):
        what = str(error).rstrip(".") if isinstance(error, with_message) else f"cannot retrieve credentials ({name})"
        return AccessDenied(what, locator=locator, hint=f"{_CREDENTIALS_HINT}; AWS_NO_SIGN_REQUEST=1 for a public bucket")
    if isinstance(error, botocore.SSLError | urllib3.SSLError):
        return ProtocolError("the server's certificate is not valid", locator=locator, hint="AWS_CA_BUNDLE names a CA")
    timeouts = (botocore.ReadTimeoutError, botocore.ConnectTimeoutError, urllib3.TimeoutError, TimeoutError)
    if isinstance(error, timeouts):
        return TimedOut("the server did not answer in time", locator=locator)
    if isinstance(
        error, (botocore.HTTPClientError, botocore.ConnectionError, botocore.IncompleteReadError, *CONNECTION_ERRORS)
    ):
        return ConnectionFailed(f"connection failed ({name})", locator=locator)
    hint = "check AWS_ENDPOINT_URL_S3, AWS_DEFAULT_REGION and the profile"
    return ProtocolError(f"the request failed, or its response is invalid ({name})", locator=locator, hint=hint)
