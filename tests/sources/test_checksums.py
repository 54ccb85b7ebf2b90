"""SHA256SUMS files in every form that the usual tools write."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelstow.backends.http.checksums import parse

A, B = "a" * 64, "b" * 64

FORMS = {
    "GNU": f"{A}  x.bin\n",
    "binary mode": f"{A} *x.bin\n",
    "universal newlines of shasum": f"{A} ?x.bin\n",
    "bits of shasum": f"{A} ^x.bin\n",
    "one space, as .NET's tools": f"{A} x.bin\n",
    "BSD, or sha256sum --tag": f"SHA256 (x.bin) = {A}\n",
    "openssl dgst": f"SHA256(x.bin)= {A}\n",
    "openssl 3": f"SHA2-256(x.bin)= {A}\n",
    "CRLF": f"{A}  x.bin\r\n",
    "no newline at the end": f"{A}  x.bin",
    "upper case": f"{A.upper()}  x.bin\n",
    "a path from here": f"{A}  ././x.bin\n",
    "comments and blank lines": f"# sums\n\n{A}  x.bin\n  \n",
    "equal duplicates": f"{A}  x.bin\n{A} *./x.bin\n",
    "its own entry, and those of signatures": f"{A}  x.bin\n{B}  SHA256SUMS\n{B}  ./SHA256SUMS.asc\n{B}  SHA256SUMS.sig\n",
    "a clear signature": f"-----BEGIN PGP SIGNED MESSAGE-----\nHash: SHA512\n\n{A}  x.bin\n"
    "-----BEGIN PGP SIGNATURE-----\n\niQIzBAEB\n-----END PGP SIGNATURE-----\n",
}


@pytest.mark.parametrize("text", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_every_form_gives_the_file_and_its_digest(text: str, encoding: str):
    """Whatever wrote it, with or without a byte-order mark."""
    assert parse(text.encode(encoding)) == {"x.bin": A}


NAMES = {
    "a name with blanks": (f"{A}  a b .bin\n", "a b .bin"),
    "a name that begins with a blank": (f"SHA256 ( x) = {A}\n", " x"),
    "parentheses": (f"SHA256 (a (1) = b) = {A}\n", "a (1) = b"),
    "a backslash": (f"\\{A}  a\\\\b.bin\n", "a\\b.bin"),
    "a line feed": (f"\\{A}  a\\nb.bin\n", "a\nb.bin"),
    "a carriage return": (f"\\SHA256 (a\\rb) = {A}\n", "a\rb"),
    "a line separator of Unicode": (f"{A}  a\u2028b\x0bc\n", "a\u2028b\x0bc"),
    "a folder of that name": (f"{A}  old/SHA256SUMS\n", "old/SHA256SUMS"),
}


@pytest.mark.parametrize(("text", "path"), NAMES.values(), ids=NAMES)
def test_names_are_those_of_the_files(text: str, path: str):
    """Escapes are undone, and nothing else separates lines."""
    assert parse(text.encode()) == {path: A}


@pytest.mark.parametrize(
    "text",
    [
        "not a sum\n",
        f"{A[:-1]}  x\n",
        f"{A}\n",
        f"MD5 (x) = {A[:32]}\n",
        f"\\{A}  a\\tb\n",
        f"{A}  x\n{B}  ./x\n",
        f"{A}\tx\n",
    ],
)
def test_anything_else_is_refused_with_its_line(text: str):
    """A line that is not understood may name a file that would be missing."""
    with pytest.raises(ValueError, match=r"line [12] "):
        parse(text.encode())


name = st.text(st.characters(exclude_characters="\0/", exclude_categories=["Cs"]), min_size=1, max_size=20)


@given(st.lists(name.filter(lambda n: n not in (".", "..") and not n.startswith("SHA256SUMS")), unique=True, max_size=4))
def test_what_sha256sum_escapes_is_read_back(names: list[str]):
    """GNU escapes: backslash, line feed and carriage return."""
    lines = []
    for each in names:
        escaped = each.replace("\\", "\\\\").replace("\n", "\\n").replace("\r", "\\r")
        mark = "\\" if escaped != each else ""
        lines.append(f"{mark}{A}  {escaped}\n")
    assert list(parse("".join(lines).encode())) == names


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="sha256sum is not installed")
@pytest.mark.parametrize("option", [[], ["-b"], ["--tag"]])
def test_what_sha256sum_writes_here_is_read(option: list[str], tmp_path: Path):
    """With odd names."""
    names = ["plain.bin", "a b.bin", "a\\b.bin", "a\nb.bin", " x"]
    for each in names:
        (tmp_path / each).write_bytes(b"x")
    ran = subprocess.run(["sha256sum", *option, "--", *names], cwd=tmp_path, capture_output=True, check=True)
    assert list(parse(ran.stdout)) == names
