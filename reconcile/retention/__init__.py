"""Retention: the roots that keep blobs, garbage collection, eviction and the space check."""
