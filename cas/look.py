"""What one stat tells of a blob."""

from __future__ import annotations

import enum
from dataclasses import dataclass


class BlobState(enum.Enum):
    """Whether a blob may be used as it stands."""

    ABSENT = "absent"
    INTACT = "intact"  # size and mtime are those of its digest
    SUSPECT = "suspect"  # something is there that needs a re-proof


@dataclass(frozen=True, slots=True)
class BlobStatus:
    """A blob as one stat saw it. ``ino`` is 0 where nothing is."""

    state: BlobState
    ino: int = 0


ABSENT = BlobStatus(BlobState.ABSENT)
