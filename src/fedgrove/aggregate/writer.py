"""PEFT adapter directories written one site at a time, and the directory that appears whole or not
at all.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import torch

from fedgrove.adapters.adapter import Factors
from fedgrove.aggregate.inputs import Source
from fedgrove.aggregate.saved import Common
from fedgrove.ground.errors import AdapterError
from fedgrove.ground.plain import Given, Plain
from fedgrove.interop.peft import CONFIG, NAMES, PREFIX, WEIGHTS

_CODES = {torch.float32: "F32", torch.float64: "F64"}
#: Tasks for which PEFT asks the file for nothing but the LoRA. For the others it also looks for a
#: head.
_HEADLESS = ("CAUSAL_LM", "SEQ_2_SEQ_LM", "FEATURE_EXTRACTION")
#: How the sites were chosen: kept where all clients agree.
_TARGETS = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")


class AdapterWriter:
    """One adapter directory. Tensors go to a spool as they come, so only one site is in memory."""

    def __init__(self, folder: Path, config: Given, dtype: torch.dtype) -> None:
        self.folder = folder
        self.config = config
        self.dtype = dtype
        self._header: Plain = {"__metadata__": {"format": "pt"}}
        self._ranks: dict[str, int] = {}
        self._alphas: dict[str, float] = {}
        self._size = 0
        folder.mkdir()
        self._spool = folder / f".{WEIGHTS}.spool"

    def add(self, site: str, factors: Factors) -> None:
        # Opened for each site: a federation may have more clients than a process may have open
        # files.
        with self._spool.open("ab") as spool:
            for letter, value in factors.tensors.items():
                self._put(spool, f"{PREFIX}{site}.{NAMES[letter]}", value)
        self._ranks[site] = factors.rank
        self._alphas[site] = _tidy(factors.scale * factors.rank)

    def save(self, name: str, value: torch.Tensor) -> None:
        """A tensor [any shape] beside the factors, under its name in the base model."""
        with self._spool.open("ab") as spool:
            self._put(spool, f"{PREFIX}{name}", value)

    def _put(
        self,
        spool: IO[bytes],
        name: str,
        value: torch.Tensor,
    ) -> None:
        """The tensor [any shape] at the spool's end, and where it stands in the header."""
        data = value.detach().to(self.dtype).contiguous()
        finite = torch.isfinite(data).all()
        if not bool(finite):
            raise AdapterError(f"{self.folder.name}, '{name}': the result overflows {self.dtype}.")
        array = data.numpy()
        if sys.byteorder == "big":
            array = array.byteswap()
        raw = array.tobytes()
        start = self._size
        self._size += len(raw)
        self._header[name] = {
            "dtype": _CODES[self.dtype],
            "shape": list(data.shape),
            "data_offsets": [start, self._size],
        }
        spool.write(raw)

    def close(self) -> None:
        """Write header, tensors and configuration."""
        text = json.dumps(self._header, separators=(",", ":"))
        header = text.encode()
        header += b" " * (-len(header) % 8)
        size = len(header).to_bytes(8, "little")
        with (self.folder / WEIGHTS).open("wb") as file:
            file.write(size + header)
            with self._spool.open("rb") as spool:
                shutil.copyfileobj(spool, file, 1 << 20)
        self._spool.unlink()
        largest = max(self._ranks, key=self._ranks.__getitem__)
        rank = self._ranks[largest]
        alpha = self._alphas[largest]
        config = {
            **self.config,
            "r": rank,
            "lora_alpha": alpha,
            "rank_pattern": {site: r for site, r in self._ranks.items() if r != rank},
            "alpha_pattern": {site: a for site, a in self._alphas.items() if a != alpha},
        }
        in_order = dict(sorted(config.items()))
        write_json(self.folder / CONFIG, in_order)


def shared_config(
    sources: Sequence[Source],
    saved: Common,
    base: str | None = None,
) -> Plain:
    """PEFT's configuration of every output, without ranks and alphas: what the clients agree on."""
    first = sources[0].config
    return {
        "peft_type": "LORA",
        "base_model_name_or_path": base or first.get("base_model_name_or_path"),
        "revision": first.get("revision"),
        "task_type": _task_type(sources, saved),
        "fan_in_fan_out": bool(first.get("fan_in_fan_out")),
        "lora_dropout": first.get("lora_dropout") or 0.0,
        "bias": "none",
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": list(saved.modules) or None,
        "use_dora": sources[0].dora,
        "use_rslora": False,
        **_targets(sources),
    }


def _task_type(sources: Sequence[Source], saved: Common) -> object:
    """PEFT's task type that all clients have; None where the outputs would lack the head that it
    asks for.
    """
    tasks = {source.config.get("task_type") for source in sources}
    if len(tasks) > 1:
        return None
    (task,) = tasks
    if task in _HEADLESS or saved.modules:
        return task
    return None


def _targets(sources: Sequence[Source]) -> Plain:
    """How the clients chose the sites, where they agree and PEFT would find them; else their
    names.
    """
    first = sources[0]
    by_name = {"target_modules": sorted(first.places)}
    chosen = {}
    for key in _TARGETS:
        value = first.config.get(key)
        if value is not None:
            chosen[key] = _plain(value)
    if not chosen.get("target_modules"):
        return by_name
    for source in sources:
        for key in _TARGETS:
            value = source.config.get(key)
            if _plain(value) != chosen.get(key):
                return by_name
    if all(targeted(site, chosen) for site in first.places):
        return chosen
    # PEFT would load such an adapter without a word, and it would do nothing
    return by_name


def targeted(site: str, config: Given) -> bool:
    """Whether PEFT would adapt the site by a configuration's choice of modules."""
    wanted = config.get("target_modules")
    if wanted == "all-linear":
        return True
    if config.get("layers_to_transform") is not None or config.get("exclude_modules"):
        return False  # name the sites instead: their own names say enough
    if isinstance(wanted, str):
        return re.fullmatch(wanted, site) is not None
    names = wanted or ()
    return any(f".{site}".endswith(f".{each}") for each in names)


def refuse_existing(out: Path) -> None:
    """AdapterError where something of that name is there."""
    if out.exists() or out.is_symlink():
        raise AdapterError(
            f"{out} exists already; name another directory with --out, or remove it first."
        )


@contextmanager
def appearing(out: Path) -> Iterator[Path]:
    """A directory next to ``out`` that becomes ``out`` when the block ends well, and goes away when
    it does not.
    """
    refuse_existing(out)
    target = out.absolute()
    made = _make_parents(target.parent)
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        partial.mkdir()
        yield partial
        for path in sorted(partial.rglob("*")):
            if path.is_file():
                with path.open("rb") as handle:
                    os.fsync(handle.fileno())
        os.rename(partial, out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        for folder in reversed(made):
            folder.rmdir()
        raise


def write_json(path: Path, content: Given) -> None:
    text = json.dumps(
        content,
        indent=2,
        ensure_ascii=False,
        allow_nan=False,
    )
    path.write_text(text + "\n", encoding="utf-8")


def _make_parents(folder: Path) -> list[Path]:
    """The folders that had to be made, outermost first."""
    missing = [each for each in (folder, *folder.parents) if not each.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    return missing[::-1]


def _plain(value: object) -> object:
    """PEFT keeps lists of modules as sets: their order means nothing."""
    if isinstance(value, list) and all(isinstance(each, str) for each in value):
        return sorted(value)
    return value


def _tidy(alpha: float) -> int | float:
    """PEFT declares alpha an int; a whole number (up to rounding of ``alpha / r * r``) is written
    as one.
    """
    whole = round(alpha)
    if whole > 0 and abs(alpha - whole) <= 1e-12 * whole:
        return whole
    return alpha
