"""Inspection of a store as values: usage, owners and roots of blobs, variants, and differences of lockfiles.

It serves the command line, servers and Python alike. Nothing is written, and no content of a blob is read.
"""
