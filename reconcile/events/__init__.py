"""One stream of events; reports, bars and JSON lines are folds of it."""
