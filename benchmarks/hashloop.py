"""The sha256 of files read into page-aligned buffers, a thread a file: what Python can reach. See ADR 18.

Run as ``python hashloop.py FILE…`` in the environment of modelstow.
"""

from __future__ import annotations

import os
import sys
from concurrent.futures import ThreadPoolExecutor

from modelstow.cas.buffers import sha256_of_fd


def digest(path: str) -> str:
    """The sha256 of one file in hex."""
    fd = os.open(path, os.O_RDONLY)
    try:
        return sha256_of_fd(fd)
    finally:
        os.close(fd)


if __name__ == "__main__":
    with ThreadPoolExecutor(len(sys.argv[1:])) as pool:
        print(*pool.map(digest, sys.argv[1:]))
