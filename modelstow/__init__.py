"""Models as packages: a manifest, a lockfile, and a disk that is made to equal it.

Names are loaded when they are first asked for: a command that finds nothing to do should be over before most of this
package would have been read.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .reconcile.desired_state import EnsureOptions
    from .reconcile.ensurer import ModelEnsurer
    from .reconcile.errors import (
        ApplyError,
        AuthError,
        ChecksumError,
        FilesystemError,
        IncompleteDownloadError,
        IntegrityError,
        InvalidConfigError,
        InvalidModelIdError,
        LockfileInvalidError,
        LockfileMissingError,
        LockfileStaleError,
        LockTimeoutError,
        ManifestValidationError,
        ModelNotFoundError,
        ModelstowError,
        NetworkTimeoutError,
        NoSpaceError,
        PathTooLongError,
        PermissionDeniedError,
        PolicyRefusedError,
        RateLimitError,
        SchemaVersionError,
        SizeMismatchError,
        SourceUnavailableError,
        VariantNotFoundError,
    )
    from .reconcile.interop.push import Pushed
    from .reconcile.planning.planner import Plan, plan
    from .reconcile.planning.state import Actual, Desired, ModelState, VariantStatus
    from .reconcile.results import ApplyResult, IntegrityReport
    from .reconcile.retention.collector import EvictionTargets
    from .reconcile.settings import Settings

__version__ = "0.2.0"

_MODULES = {
    "settings": ("Settings",),
    "ensurer": ("ModelEnsurer",),
    "interop.push": ("Pushed",),
    "results": ("IntegrityReport", "ApplyResult"),
    "desired_state": ("EnsureOptions",),
    "planning.planner": ("Plan", "plan"),
    "planning.state": ("Actual", "Desired", "ModelState", "VariantStatus"),
    "retention.collector": ("EvictionTargets",),
}


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = next((module for module, names in _MODULES.items() if name in names), "errors")
    import importlib

    value: object = getattr(importlib.import_module(f".reconcile.{module}", __name__), name)
    globals()[name] = value
    return value


__all__ = [
    "Actual",
    "ApplyError",
    "ApplyResult",
    "AuthError",
    "ChecksumError",
    "Desired",
    "EnsureOptions",
    "EvictionTargets",
    "FilesystemError",
    "IncompleteDownloadError",
    "IntegrityError",
    "IntegrityReport",
    "InvalidConfigError",
    "InvalidModelIdError",
    "LockTimeoutError",
    "LockfileInvalidError",
    "LockfileMissingError",
    "LockfileStaleError",
    "ManifestValidationError",
    "ModelEnsurer",
    "ModelNotFoundError",
    "ModelState",
    "ModelstowError",
    "NetworkTimeoutError",
    "NoSpaceError",
    "PathTooLongError",
    "PermissionDeniedError",
    "Plan",
    "PolicyRefusedError",
    "Pushed",
    "RateLimitError",
    "SchemaVersionError",
    "Settings",
    "SizeMismatchError",
    "SourceUnavailableError",
    "VariantNotFoundError",
    "VariantStatus",
    "plan",
]
