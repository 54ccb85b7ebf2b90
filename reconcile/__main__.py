"""``python -m reconcile``: the same as ``modelstow``."""

from .cli.main import console

console()
