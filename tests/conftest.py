"""What every test shares."""

from __future__ import annotations

import os

# Before anything imports torch or tokenizers: results that depend on no machine's core count, and
# no stray threads.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")

from typing import Literal

import pytest
from hypothesis import settings
from jaxtyping import install_import_hook
from pydantic import BaseModel, ConfigDict, Field
from tests.shapes import WATCHED

install_import_hook(WATCHED, "tests.shapes.checked")  # before anything imports what is watched

# The same examples in every run: a change breaks a test, not a draw. HYPOTHESIS_PROFILE=explore
# draws new ones.
settings.register_profile("repeat", derandomize=True)
settings.register_profile("explore")
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeat"))

pytest_plugins = ["tests.fixtures"]


class _Options(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class _Mean(_Options):
    weights: Literal["examples", "uniform"] = Field("examples", description="Weights of the mean.")


class _Tree(_Options):
    K: int = Field(
        3, ge=1, description="How many more groups a layer may have than the one below it."
    )
    tau: float = Field(0.1, description="Score of a single group.")
    warmup_rounds: int | None = Field(None, ge=0, description="Rounds of warm-up.", examples=[2])


@pytest.fixture
def few_methods(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three methods by name and options alone: a test of the job needs no torch and depends on no
    method's own keys.
    """
    from fedgrove.methods import registry

    options: dict[str, type[BaseModel]] = {"fedit": _Mean, "fedtreelora": _Tree, "local": _Options}
    monkeypatch.setattr(registry, "names", lambda: list(options))
    monkeypatch.setattr(registry, "options_of", options.__getitem__)
