"""In and out of other worlds."""
