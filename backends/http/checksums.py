"""SHA256SUMS files in the forms that ``sha256sum -c``, ``shasum -c`` and ``openssl`` write and read."""

from __future__ import annotations

import codecs
import re

NAME = "SHA256SUMS"
_HEX = "([0-9A-Fa-f]{64})"
# GNU and Perl mark the mode by '*', '?' or '^'; .NET's tools write one space.
_GNU = re.compile(rf"(\\?){_HEX} [ *?^]?(.+)\Z", re.DOTALL)
_TAGGED = re.compile(rf"(\\?)SHA(?:2-)?256 ?\((.+)\) ?= ?{_HEX}\Z", re.DOTALL)  # BSD, and openssl dgst
_ESCAPES = {r"\\": "\\", r"\n": "\n", r"\r": "\r"}
_ARMOUR = re.compile(r"-----BEGIN PGP SIGNED MESSAGE-----\n.*?\n\n(.*?)\n-----BEGIN PGP SIGNATURE-----", re.DOTALL)


def parse(data: bytes) -> dict[str, str]:
    """The sha256 of each file, in lower-case hex by its path. Raises ValueError naming the line.

    The file's own entry is left out, as are those of signatures over it.
    """
    text = _decode(data).replace("\r\n", "\n")
    if signed := _ARMOUR.search(text):
        text = signed[1].replace("\n- ", "\n")  # dash escapes, RFC 4880, 7.1
    rows: dict[str, str] = {}
    for number, line in enumerate(text.split("\n"), 1):  # no other character separates lines: names may have U+2028
        line = line.rstrip("\r")
        if not line.strip() or line.startswith("#"):
            continue
        path, digest = _row(line, number)
        while path.startswith("./"):
            path = path[2:]
        if path == NAME or path.startswith(f"{NAME}."):
            continue
        if rows.setdefault(path, digest) != digest:
            raise ValueError(f"line {number} has another sha256 for {path[:80]!a} than a line before")
    return rows


def _decode(data: bytes) -> str:
    for mark, encoding in (
        (codecs.BOM_UTF16_LE, "utf-16"),
        (codecs.BOM_UTF16_BE, "utf-16"),
        (codecs.BOM_UTF8, "utf-8-sig"),
    ):
        if data.startswith(mark):
            return data.decode(encoding)
    return data.decode("utf-8")


def _row(line: str, number: int) -> tuple[str, str]:
    if match := _GNU.match(line):
        escaped, digest, path = match.groups()
    elif match := _TAGGED.match(line):
        escaped, path, digest = match.groups()
    else:
        raise ValueError(f"line {number} is not '<64 hex>  <path>'")
    if escaped:
        path = re.sub(r"\\.", lambda pair: _unescape(pair[0], number), path, flags=re.DOTALL)
    return path, digest.lower()


def _unescape(pair: str, number: int) -> str:
    if pair not in _ESCAPES:
        raise ValueError(f"line {number} has the unknown escape {pair!a}")
    return _ESCAPES[pair]
