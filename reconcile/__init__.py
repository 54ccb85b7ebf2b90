"""Desired against actual: manifest, lockfile, plan, transfer, checkout, retention, and the command line."""
