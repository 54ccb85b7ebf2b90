"""The stream of events of a run. Reports, progress bars and JSON lines are folds of it."""
