"""Fixtures on the tiny model, for every room."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.tiny import save_bert, save_exchanges, save_llama, save_silos


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a random BERT of 2 × 32 with a word tokenizer."""
    return save_bert(tmp_path_factory.mktemp("models") / "tiny-bert")


@pytest.fixture(scope="session")
def silos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three sites of a few dozen sentences."""
    return save_silos(tmp_path_factory.mktemp("data") / "silos")


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a random Llama of 2 × 32 with a word tokenizer and a chat template."""
    return save_llama(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture(scope="session")
def exchanges(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three sites of a few dozen prompts and completions."""
    return save_exchanges(tmp_path_factory.mktemp("data") / "exchanges")
