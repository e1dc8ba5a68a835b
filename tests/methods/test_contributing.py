"""The method that CONTRIBUTING.md shows is a method."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType

from tests.methods.kit import satisfies

PAGE = Path(__file__).parents[2] / "CONTRIBUTING.md"


def test_the_example_is_a_method() -> None:
    found = re.search(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
    assert found is not None
    module = ModuleType("fed_median")
    sys.modules[module.__name__] = module  # where a dataclass looks for its annotations
    try:
        exec(found.group(1), vars(module))
        satisfies(module.FedMedian)
    finally:
        del sys.modules[module.__name__]
