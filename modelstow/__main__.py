"""``python -m modelstow``: the same as ``modelstow``."""

from .reconcile.cli.main import console

console()
