"""The image encoder that the package brings along: small, complete, loadable by name, and better
than raw pixels.
"""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fedgrove.federation.assets import asset
from fedgrove.federation.drawings import SUPERCLASS_OF
from fedgrove.ground.errors import DataError
from fedgrove.interop.models import load_base, resolve_name

FOLDER = Path(resolve_name("grove-vit"))
BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def pretraining() -> Any:
    """The module ``benchmarks/pretrain_vit.py``."""
    sys.path.insert(0, str(BENCHMARKS))  # it imports its neighbour
    try:
        described = importlib.util.spec_from_file_location(
            "pretrain_vit", BENCHMARKS / "pretrain_vit.py"
        )
        assert described is not None
        assert described.loader is not None
        module = importlib.util.module_from_spec(described)
        sys.modules["pretrain_vit"] = module
        described.loader.exec_module(module)
        return module
    finally:
        sys.path.remove(str(BENCHMARKS))


def test_it_lies_in_the_package_and_is_small() -> None:
    import fedgrove

    assert FOLDER.is_relative_to(Path(fedgrove.__file__).parent)
    assert {path.name for path in FOLDER.iterdir()} == {
        "README.md", "config.json", "model.safetensors", "preprocessor_config.json"
    }  # fmt: skip
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= 10e6
    assert {value.dtype for value in load_file(FOLDER / "model.safetensors").values()} == {
        torch.float16
    }


def test_it_loads_by_name_with_query_and_value_of_nine_layers() -> None:
    base = load_base("grove-vit", task="classify-images")
    assert (base.hidden, base.layers, len(base.sites)) == (192, tuple(range(9)), 18)
    assert base.processor.size["height"] == 32
    states = base.model(pixel_values=torch.zeros(1, 3, 32, 32)).last_hidden_state
    assert states.shape == (1, 65, 192)
    assert states.isfinite().all()


def test_the_drawings_of_the_jobs_are_none_that_it_saw(pretraining: Any) -> None:
    assert len(set(pretraining.SEEN)) == 245
    assert not set(pretraining.SEEN) & set(SUPERCLASS_OF)


def test_the_card_says_data_recipe_probe_and_licences() -> None:
    card = (FOLDER / "README.md").read_text(encoding="utf-8")
    for said in (
        "CIFAR-10",
        "Quick, Draw!",
        "CC BY 4.0",
        "MobileSAM",
        "Apache-2.0",
        "pretrain_vit.py",
        "raw pixels",
    ):
        assert said in card


def test_a_resumed_pretraining_equals_one_never_stopped(pretraining: Any, tmp_path: Path) -> None:
    student = pretraining.Student()
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)

    def step(model: Any, rule: Any, seed: int) -> None:
        rng = pretraining.generator(seed, "step")
        kept = torch.rand(4, 64, generator=rng).argsort(1)[:, :32]
        hidden = model(torch.randn(4, 3, 32, 32, generator=rng), kept)
        wide, cells = torch.randn(3, 640, generator=rng), torch.randn(3, 320, 4, 4, generator=rng)
        pretraining.losses(model, hidden, kept, wide, cells, torch.tensor([7])).backward()
        rule.step()
        rule.zero_grad()

    step(student, optimizer, 1)
    pretraining.keep(tmp_path / "checkpoint.safetensors", student, optimizer, 1)
    step(student, optimizer, 2)
    other = pretraining.Student()
    rule = torch.optim.AdamW(other.parameters(), lr=1e-3)
    assert pretraining.resume(tmp_path / "checkpoint.safetensors", other, rule) == 1
    step(other, rule, 2)
    for name, value in student.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


def test_a_token_is_compared_with_the_cell_it_lies_in(pretraining: Any) -> None:
    student = pretraining.Student()
    with torch.no_grad():
        student.dense.weight.zero_()
        student.dense.bias.zero_()
        for head in (student.pooled, student.cls):
            head.weight.zero_()
            head.bias.zero_()
    cells = torch.zeros(1, 320, 4, 4)
    cells[0, :, 1, 3] = 1.0  # tokens of rows 2, 3 and columns 6, 7
    hidden, labels = torch.zeros(2, 2, 192), torch.tensor([0])
    wide = torch.zeros(1, 640)
    inside, outside = (
        pretraining.losses(student, hidden, torch.tensor([[token]] * 2), wide, cells, labels).item()
        for token in (8 * 3 + 6, 8 * 3 + 5)
    )
    assert inside - outside == pytest.approx(0.5)  # smooth L1 of 1


@pytest.mark.slow
def test_the_probe_beats_raw_pixels_by_twenty_points(pretraining: Any) -> None:
    try:
        asset("photos")
    except DataError as error:
        pytest.skip(str(error))
    frozen, raw = pretraining.probe(FOLDER), pretraining.probe(None)
    assert frozen >= raw + 0.2
    claimed = re.search(r"\*\*(\.\d+)\*\*", (FOLDER / "README.md").read_text(encoding="utf-8"))
    assert claimed is not None
    assert frozen == pytest.approx(float(claimed.group(1)), abs=0.01)  # the card tells the truth
