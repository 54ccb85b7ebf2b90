"""``python -m modelstow``: the same as ``modelstow``."""

from .reconcile.cli.console import console

console()
