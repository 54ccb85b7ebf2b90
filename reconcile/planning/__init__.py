"""Actual state, by stat and by content, and its difference to the desired state, as data."""
