"""The tests' model hub over one folder: one repository, one revision, every file kept as LFS."""

from __future__ import annotations

import sys
from pathlib import Path
from threading import Event

REPOSITORY = "bench/model"
COMMIT = "c0ffee" + "0" * 34


def main(folder: Path) -> None:
    """Serve *folder* until killed; the port is printed first."""
    sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
    from hub import Hub, Repository

    with Hub() as hub:
        repository = hub.repositories[REPOSITORY] = Repository(lfs=("*",))
        repository.commit({path.name: path for path in sorted(folder.iterdir()) if path.is_file()}, name=COMMIT)
        print(hub.port, flush=True)
        Event().wait()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
