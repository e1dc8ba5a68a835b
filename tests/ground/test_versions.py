from __future__ import annotations

import json
import platform
from importlib.metadata import version
from pathlib import Path

from fedgrove.ground import versions


def test_versions_are_those_installed_and_absent_packages_are_left_out(tmp_path: Path) -> None:
    versions.write(tmp_path)
    found = json.loads((tmp_path / "versions.json").read_text())
    assert found["python"] == platform.python_version()
    assert found["numpy"] == version("numpy")
    assert all(found.values())
