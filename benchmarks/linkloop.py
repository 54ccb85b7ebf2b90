"""The least that linking a tree can cost in Python: mkdir and link(2) relative to open folders, one thread, no record.

Run as ``python -I -S linkloop.py TREE NEW``.
"""

import os
import sys


def main(source: str, target: str) -> None:
    """Make *target* a tree of hardlinks to the files of *source*, one folder deep."""
    os.mkdir(target)
    top_from, top_to = os.open(source, os.O_RDONLY), os.open(target, os.O_RDONLY)
    for folder in os.listdir(top_from):
        os.mkdir(folder, dir_fd=top_to)
        here, there = os.open(folder, os.O_RDONLY, dir_fd=top_from), os.open(folder, os.O_RDONLY, dir_fd=top_to)
        for name in os.listdir(here):
            os.link(name, name, src_dir_fd=here, dst_dir_fd=there)
        os.close(here)
        os.close(there)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
