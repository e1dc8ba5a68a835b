"""``RUN/versions.json``: what the numbers were made with. Its own file, because summary.json must
not vary.
"""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from fedgrove.ground import files

_PACKAGES = (
    "fedgrove",
    "torch",
    "transformers",
    "peft",
    "tokenizers",
    "safetensors",
    "numpy",
    "flwr",
    "flwr-datasets",
)


def versions() -> dict[str, str]:
    """``{"python": "3.11.9", "torch": "2.13.0", ...}``: what is installed here; absent packages are
    left out.
    """
    found = {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
    }
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def write(run_dir: Path) -> None:
    files.write_json(run_dir / "versions.json", versions())
