"""Adapter directories as any tool would write them, and a reader of its own for what comes out.
Dense, float64.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

Array = NDArray[np.float64]
#: site -> (out, in)
SITES = {
    "encoder.layer.0.attention.self.query": (10, 7),
    "encoder.layer.0.attention.self.value": (12, 7),
    "encoder.layer.1.attention.self.query": (10, 7),
    "encoder.layer.10.attention.self.value": (9, 7),
}
PREFIX = "base_model.model."


def draw(
    seed: int, rank: int | Mapping[str, int], sites: Mapping[str, tuple[int, int]] = SITES
) -> dict[str, Any]:
    """``{site: (A, B)}``, badly scaled: the size differs by site and client."""
    rng = np.random.default_rng(seed)
    result = {}
    for site, (out, into) in sites.items():
        r = rank if isinstance(rank, int) else rank[site]
        size = 10.0 ** rng.uniform(-2, 1)
        result[site] = (rng.normal(size=(r, into)), size * rng.normal(size=(out, r)))
    return result


def write(folder: Path, factors: Mapping[str, Any], alpha: float, **config: Any) -> Path:
    """A PEFT directory of these factors; ``dtype``, ``rank_pattern`` and so on may be given."""
    dtype = config.pop("dtype", torch.float64)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for site, (a, b) in factors.items():
        tensors[f"{PREFIX}{site}.lora_A.weight"] = torch.tensor(a, dtype=dtype)
        tensors[f"{PREFIX}{site}.lora_B.weight"] = torch.tensor(b, dtype=dtype)
    save_file(tensors, folder / "adapter_model.safetensors")
    content = {
        "peft_type": "LORA",
        "base_model_name_or_path": "some/base",
        "r": int(next(iter(factors.values()))[0].shape[0]),
        "lora_alpha": alpha,
        "target_modules": ["query", "value"],
        "rank_pattern": {},
        "alpha_pattern": {},
        "task_type": "FEATURE_EXTRACTION",
        **config,
    }
    (folder / "adapter_config.json").write_text(json.dumps(content))
    return folder


def many(
    root: Path, ranks: Sequence[int], alphas: Sequence[float], seed: int = 0
) -> tuple[list[Path], list[dict[str, Any]]]:
    """Clients ``c0, c1, ...`` on disk, and their factors."""
    factors = [draw(seed + number, rank) for number, rank in enumerate(ranks)]
    folders = [
        write(root / f"c{number}", each, alpha)
        for number, (each, alpha) in enumerate(zip(factors, alphas, strict=True))
    ]
    return folders, factors


def products(
    factors: Sequence[Mapping[str, Any]], alphas: Sequence[float], site: str
) -> list[Array]:
    """The clients' dense updates ``alpha / r B A``."""
    return [
        alpha / each[site][0].shape[0] * each[site][1] @ each[site][0]
        for each, alpha in zip(factors, alphas, strict=True)
    ]


def read(folder: Path) -> dict[str, tuple[Array, Array, float]]:
    """``{site: (A, B, alpha / r)}``, checked to be what the configuration says."""
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert config["base_model_name_or_path"] == "some/base"
    tensors = load_file(folder / "adapter_model.safetensors")
    result = {}
    for name in tensors:
        if not name.endswith(".lora_A.weight"):
            continue
        site = name.removeprefix(PREFIX).removesuffix(".lora_A.weight")
        a, b = (tensors[f"{PREFIX}{site}.lora_{half}.weight"].double().numpy() for half in "AB")
        rank = config["rank_pattern"].get(site, config["r"])
        assert a.shape[0] == b.shape[1] == rank
        result[site] = (a, b, config["alpha_pattern"].get(site, config["lora_alpha"]) / rank)
    assert len(tensors) == 2 * len(result)
    return result


def dense(folder: Path) -> dict[str, Array]:
    return {site: scale * b @ a for site, (a, b, scale) in read(folder).items()}


def weighted(matrices: Sequence[Array], weights: Sequence[float]) -> Array:
    total: Array = sum(w * m for w, m in zip(weights, matrices, strict=True)) / sum(weights)  # type: ignore[assignment]
    return total


def best(matrix: Array, rank: int) -> Array:
    """The best approximation of that rank."""
    u, s, vh = np.linalg.svd(matrix, full_matrices=False)
    result: Array = (u[:, :rank] * s[:rank]) @ vh[:rank]
    return result


def close(first: Array, second: Array, tolerance: float = 1e-11) -> None:
    assert first.shape == second.shape
    assert np.linalg.norm(first - second) <= tolerance * max(
        np.linalg.norm(first), np.linalg.norm(second)
    )


def total_noise(folder: Path) -> tuple[float | None, dict[str, float]]:
    content = json.loads((folder / "noise.json").read_text())
    return content["n_agg"], {site: each["n_agg"] for site, each in content["sites"].items()}
