"""Desired state: the manifest that people write, the lockfile that pins it, and the resolver between them."""
