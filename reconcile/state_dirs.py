"""The folders below ``state/`` in which this package keeps records of its own; the store's are named by its layout."""

ROOTS = "roots"  # the lockfiles that were reconciled
VERIFYING = "verifying"  # marks of live verifications
BAD_SOURCES = "bad-sources"  # which source sent corrupt data for which digest
HASH_CACHE = "hash-cache"  # digests of files that no listing names, by locator and version
