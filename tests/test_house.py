"""The house rules that a program can check, over every file that git tracks or would track."""

from __future__ import annotations

import ast
import re
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

#: The host of a package registry, or a path that exists on one machine only.
FOREIGN = re.compile(
    r"://[a-z0-9.-]*(pypi|hosted|npm|debian)"
    r"|(?:^|[^A-Za-z0-9._~-])/(?:work|farm|root|home|Users|workspace|mnt)/",
    re.MULTILINE,
)
#: Modules that run code when they read data.
UNSAFE = re.compile(
    r"^\s*(?:import|from)\s+(?:pickle|cPickle|dill|cloudpickle|joblib|shelve)\b", re.MULTILINE
)


def tracked() -> list[Path]:
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    found = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=False)
    if found.returncode:
        pytest.skip("no git checkout")
    return [ROOT / name for name in found.stdout.split("\0") if name and (ROOT / name).is_file()]


def texts() -> dict[str, str]:
    read = {}
    for path in tracked():
        content = path.read_bytes()
        if b"\0" not in content:
            read[str(path.relative_to(ROOT))] = content.decode("utf-8", errors="replace")
    return read


def test_the_rules_catch_what_they_are_for() -> None:
    assert FOREIGN.search("see https://" + "pypi.org/simple")
    assert FOREIGN.search("path = '" + "/ho" + "me/somebody/x'")
    assert not FOREIGN.search(
        "the folder ./work/ or docs/home/ of https://www.apache.org/licenses/"
    )
    assert UNSAFE.search("    import " + "pickle\n")


def test_no_registry_host_and_no_path_of_one_machine() -> None:
    found = {
        name: match.group() for name, text in texts().items() if (match := FOREIGN.search(text))
    }
    assert found == {}


def test_nothing_is_pickled() -> None:
    sources = {name: text for name, text in texts().items() if name.endswith(".py")}
    assert len(sources) > 10
    assert {
        name: match.group() for name, text in sources.items() if (match := UNSAFE.search(text))
    } == {}


def test_no_private_name_is_imported_from_another_module() -> None:
    found = set()
    for path in tracked():
        if path.suffix != ".py" or not path.is_relative_to(ROOT / "src"):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fedgrove"):
                private = [name.name for name in node.names if re.match("_[^_]", name.name)]
                found |= {f"{path.relative_to(ROOT)}: {name}" for name in private}
    assert found == set()


def test_no_file_is_large() -> None:
    assert {path.name for path in tracked() if path.stat().st_size > 10.5 * 2**20} == set()


def test_the_licence_is_apache_2() -> None:
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    words = " ".join(text.split())
    assert words.startswith(
        "Apache License Version 2.0, January 2004 http://www.apache.org/licenses/"
    )
    assert "9. Accepting Warranty or Additional Liability." in words
    assert "END OF TERMS AND CONDITIONS" in words
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["license"] == "Apache-2.0"
    assert project["license-files"] == ["LICENSE"]


def test_torch_is_pinned_in_the_makefile_alone() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (torch,) = [need for need in project["dependencies"] if need.startswith("torch")]
    assert "==" not in torch  # a machine with a GPU brings its own build
    assert re.search(
        r"^TORCH := 2\.13\.0$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE
    )
