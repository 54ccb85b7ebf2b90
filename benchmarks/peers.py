"""Tools of other projects that live in a virtual environment of their own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from .measure import Options, environment


class NotAvailable(Exception):
    """A peer cannot be measured here; the text says why."""


def hf(options: Options) -> Path:
    """The ``hf`` program of huggingface_hub, installed on first use. Raises NotAvailable."""
    program = options.peers / "bin" / "hf"
    if not program.exists():
        if not options.install_peers:
            raise NotAvailable(f"huggingface_hub is not installed in {options.peers.name}")
        _install(options.peers, "huggingface_hub")
    if not program.exists():
        raise NotAvailable("huggingface_hub has no hf program")
    return program


def hub(folder: Path, address: str) -> dict[str, str]:
    """The environment in which ``hf`` asks the hub at *address* and keeps its cache in *folder*, over plain HTTP."""
    return environment(
        folder / "root",
        HF_ENDPOINT=address,
        HF_HOME=str(folder / "home"),
        HF_HUB_DISABLE_XET="1",
        HF_HUB_DISABLE_TELEMETRY="1",
        HF_HUB_DISABLE_UPDATE_CHECK="1",
        HF_HUB_DISABLE_PROGRESS_BARS="1",
    )


def _install(folder: Path, package: str) -> None:
    for argv in ([sys.executable, "-m", "venv", folder], [folder / "bin" / "pip", "install", "--quiet", package]):
        done = subprocess.run([*map(str, argv)], capture_output=True, text=True)
        if done.returncode != 0:
            lines = (done.stderr or done.stdout).strip().splitlines() or ["no reason given"]
            raise NotAvailable(f"{package} could not be installed ({lines[-1][:120]})")
