"""``hf://``: the repositories of a model hub."""
