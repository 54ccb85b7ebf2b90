"""Trees on disk: published in one step, repaired in place, removed."""
