"""Versions of the packages that a run uses."""

from __future__ import annotations

import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from hfpretrain import __version__

LIBRARIES = ("hfpretrain", "torch", "transformers", "accelerate", "datasets", "tokenizers")
"""The packages that every run uses."""
_OTHERS = ("evaluate", "deepspeed", "torchao", "schedulefree")


def versions() -> dict[str, str]:
    """The versions of this package and the libraries that are installed, by name."""
    return {name: known for name in (*LIBRARIES, *_OTHERS) if (known := version_of(name)) is not None}


def version_of(name: str) -> str | None:
    """The version of a package; None if it is not installed. This package itself need not be installed."""
    if name == "hfpretrain":
        return __version__
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def commit() -> str | None:
    """The commit of this package if it runs from a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
