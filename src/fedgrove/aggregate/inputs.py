"""PEFT adapter directories that anyone wrote: checked whole, then read one site at a time.

What is kept of a directory is what its configuration and its file's header say; its tensors are
read when a site's turn comes and dropped again, so memory does not grow with the number of clients
times the model.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from fedgrove.adapters.adapter import Factors, Site, factors_of, scale_of
from fedgrove.ground.errors import AdapterError
from fedgrove.ground.plain import Given, Plain
from fedgrove.interop.keys import plain_name
from fedgrove.interop.peft import CARD, CONFIG, HEAD, WEIGHTS, read_json
from fedgrove.interop.targets import layer_numbers

_PAIR = re.compile(r"^(?P<site>.+)\.lora_(?P<half>[AB])(?:\.[^.]+)?\.weight$")
_MAGNITUDE = re.compile(r"^(?P<site>.+)\.lora_magnitude_vector(?:\.[^.]+)?(?:\.weight)?$")
_FLOATS = {"F64", "F32", "F16", "BF16"}
#: Settings under which ``lora_alpha / r * B @ A`` on the untouched base is not what the adapter
#: computes.
_ALTERED = {
    "lora_bias": "it trains biases inside the LoRA",
    "use_qalora": "it is a QA-LoRA adapter",
    "use_bdlora": "it is a block-diagonal LoRA",
    "alora_invocation_tokens": "it is an activated LoRA, which depends on the input",
    "arrow_config": "it routes between adapters",
    "kasa_config": "it has singular values beside its factors",
    "monteclora_config": "it samples its factors",
    "layer_replication": "it repeats layers of the base model",
    "trainable_token_indices": "it trains token embeddings",
    "target_parameters": "it adapts parameters that are no linear layers",
}
#: Initialisations that also change the base weights, so that the factors alone are no update of the
#: published base.
_BASE_CHANGING = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True, slots=True)
class FactorNames:
    """Where a site is in one client's file: the names of its two tensors, of DoRA three, its rank
    and its scale ``alpha / r``.
    """

    A: str
    B: str
    rank: int
    scale: float
    shape: tuple[int, int]  # (out, in)
    M: str | None = None

    @property
    def names(self) -> list[str]:
        return [name for name in (self.A, self.B, self.M) if name is not None]


@dataclass(frozen=True, slots=True)
class Saved:
    """A tensor that is no LoRA factor: the file that holds it, its name there and its shape."""

    file: Path
    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Source:
    """One checked adapter directory."""

    name: str
    folder: Path
    config: Given
    places: Mapping[str, FactorNames]
    dtype: torch.dtype  # the widest of its factors
    others: Mapping[str, Saved]  # by their name in the base: modules to save, a head of its own

    @property
    def file(self) -> Path:
        return self.folder / WEIGHTS

    def read(self, site: str) -> Factors:
        """The site's factors in float64."""
        place = self.places[site]
        try:
            with safe_open(self.file, "pt") as file:
                sides = [file.get_tensor(name) for name in place.names]
                sides = [side.to(torch.float64, copy=True) for side in sides]
        except (OSError, SafetensorError) as error:
            raise AdapterError(
                f"{self.file} can no longer be read ({error}); leave the files alone."
            ) from error
        return factors_of(sides, place.scale)

    @property
    def dora(self) -> bool:
        """Whether its sites have DoRA's magnitudes."""
        return bool(self.config.get("use_dora"))

    def saved(self, name: str) -> torch.Tensor:
        """A tensor beside the factors, in float64 [as ``others`` says]."""
        found = self.others[name]
        with safe_open(found.file, "pt") as file:
            value: torch.Tensor = file.get_tensor(found.name).to(torch.float64, copy=True)
        return value

    def check_values(self) -> None:
        """Refuse NaN and Inf, reading one tensor at a time."""
        with safe_open(self.file, "pt") as file:
            for place in self.places.values():
                for name in place.names:
                    finite = torch.isfinite(file.get_tensor(name)).all()
                    if not bool(finite):
                        raise AdapterError(
                            f"{self.file}: the tensor '{name}' holds NaN or Inf; leave this client "
                            f"out."
                        )
        for found in self.others.values():
            with safe_open(found.file, "pt") as file:
                finite = torch.isfinite(file.get_tensor(found.name)).all()
            if not bool(finite):
                raise AdapterError(
                    f"{found.file}: the tensor '{found.name}' holds NaN or Inf; leave this client "
                    f"out."
                )

    def card(self) -> Plain:
        """``fedgrove.json``, or nothing where there is none."""
        if (self.folder / CARD).exists():
            return read_json(self.folder / CARD)
        return {}

    def classes(self) -> tuple[str, ...]:
        """The names of the head's outputs in their order, by our card or by a model's configuration
        beside the adapter; () where nothing names them.
        """
        named = self.card().get("labels")
        if named:
            return tuple(map(str, named))
        path = self.folder / "config.json"
        if not path.exists():
            return ()
        table = read_json(path).get("id2label")
        if not isinstance(table, dict) or not all(str(key).isdigit() for key in table):
            return ()
        inside = tuple(str(table[key]) for key in sorted(table, key=int))
        if all(re.fullmatch(r"LABEL_\d+", each) for each in inside):
            return ()
        return inside


def open_clients(folders: Sequence[Path], *, base: str | None = None) -> list[Source]:
    """The clients in the order given, named by their directories and checked against the first,
    values excepted. ``base`` names the one base model of all.
    """
    if not folders:
        raise AdapterError("There is no client directory; give at least one.")
    seen: dict[str, Path] = {}
    for folder in folders:
        name = folder.absolute().name
        if not name or name in (".", ".."):
            name = folder.resolve().name
        # What else is written beside the clients' directories ends in .json.
        if name.startswith(("_", ".")) or not name or name.endswith(".json"):
            raise AdapterError(
                f"{folder}: a client cannot be called '{name}'; rename the directory."
            )
        if name in seen:
            raise AdapterError(
                f"{seen[name]} and {folder} are both called '{name}'; rename one of the "
                f"directories."
            )
        seen[name] = folder
    sources = [open_source(folder, name) for name, folder in seen.items()]
    for other in sources[1:]:
        check_alike(sources[0], other, base=base)
    return sources


def open_source(folder: Path, name: str) -> Source:
    """One directory, checked by its configuration and its file's header. AdapterError names file
    and tensor.
    """
    if not folder.is_dir():
        raise AdapterError(f"{folder} is not a directory; give adapter directories.")
    if not (folder / WEIGHTS).exists():
        for pickled in ("adapter_model.bin", "adapter_model.pt", "pytorch_model.bin"):
            if (folder / pickled).exists():
                raise AdapterError(
                    f"{folder / pickled} holds pickled weights, which are not read because they "
                    f"can run code; save "
                    "the adapter as safetensors."
                )
    _refuse_outer(folder)
    config = read_json(folder / CONFIG)
    _check_config(folder / CONFIG, config)
    places, others, dtypes = _places(folder, config)
    dtype = torch.float32
    if "F64" in dtypes:
        dtype = torch.float64
    return Source(name, folder, config, places, dtype, others)


def _refuse_outer(folder: Path) -> None:
    """Refuse a directory whose adapter lies one level below, as Trainer's checkpoints do."""
    if (folder / CONFIG).exists():
        return
    inner = [path.parent for path in sorted(folder.glob(f"*/{CONFIG}"))]
    if inner:
        found = ", ".join(map(str, inner[:3]))
        raise AdapterError(f"{folder} is no adapter directory, but has some inside: name {found}.")


def check_alike(first: Source, other: Source, *, base: str | None = None) -> None:
    """Refuse another base model, other sites, or sites of another size.

    The same model may lie under different paths: then the last part of the path tells, unless
    ``base`` names what all are adapters of.
    """
    ours = base_of(first)
    theirs = base_of(other)
    if base is None and not theirs:
        raise AdapterError(
            f"{other.folder / CONFIG} names no base model (base_model_name_or_path), but "
            f"{first.folder} has '{ours}'; name the one of all with --base."
        )
    if base is None and _last_part(ours) != _last_part(theirs):
        raise AdapterError(
            f"{other.folder / CONFIG}: the base model is '{theirs}', but {first.folder} has "
            f"'{ours}'; aggregate adapters of one base model, or name it with --base where it is "
            "one under two names."
        )
    revision = _revision(first)
    others = _revision(other)
    if revision != others:
        raise AdapterError(
            f"{other.folder / CONFIG}: the revision of the base model is '{others}', but "
            f"{first.folder} has '{revision}'; aggregate adapters of one base model."
        )
    turned = bool(first.config.get("fan_in_fan_out"))
    if turned != bool(other.config.get("fan_in_fan_out")):
        raise AdapterError(
            f"{other.folder / CONFIG}: fan_in_fan_out is not that of {first.folder}; use one for "
            f"all."
        )
    if first.dora != other.dora:
        raise AdapterError(
            f"{other.folder / CONFIG}: use_dora is not that of {first.folder}; DoRA's adapters are "
            f"no mean with plain ones."
        )
    for site in sorted(first.places.keys() ^ other.places.keys()):
        if site in first.places:
            raise AdapterError(
                f"{other.file} lacks '{first.places[site].A}', which {first.folder} has; use the "
                f"same targets for all."
            )
        raise AdapterError(
            f"{other.file} has '{other.places[site].A}', which {first.folder} lacks; use the same "
            f"targets for all."
        )
    for site, place in other.places.items():
        _check_shape(
            other,
            place,
            first,
            first.places[site],
        )


def _check_shape(other: Source, place: FactorNames, first: Source, wanted: FactorNames) -> None:
    sides = zip(
        ("out", "in"),
        (place.B, place.A),
        place.shape,
        wanted.shape,
        strict=True,
    )
    for side, name, found, due in sides:
        if found != due:
            raise AdapterError(
                f"{other.file}: '{name}' has {found} {side} features, but {due} in "
                f"{first.folder}; use the same base model everywhere."
            )


def _last_part(base: str) -> str:
    """What tells a base model where it lies under several paths: the last part of the path, also of
    Windows, or the model's name in a hub's cache (``models--ORG--NAME/snapshots/HASH``).
    """
    parts = re.split(r"[/\\]", base)
    if len(parts) > 2 and parts[-2] == "snapshots":
        return parts[-3].rsplit("--", 1)[-1].casefold()
    return parts[-1].casefold()


def _revision(source: Source) -> str:
    """ "" for the branch that a hub gives where none is named."""
    revision = str(source.config.get("revision") or "")
    if revision == "main":
        return ""
    return revision


def base_of(source: Source) -> str:
    """What the configuration calls the base model."""
    name = source.config.get("base_model_name_or_path") or ""
    return str(name).rstrip("/")


def sites_of(source: Source) -> dict[str, Site]:
    """The sites by layer, shallow to deep. Layers come from the tensor names; a site outside them
    is one above all.
    """
    numbers = layer_numbers(source.places)
    known = [number for number in numbers.values() if number is not None]
    above = max(known, default=-1) + 1
    sites = []
    for name, place in source.places.items():
        layer = numbers[name]
        if layer is None:
            layer = above
        out_features, in_features = place.shape
        sites.append(Site(name, layer, in_features, out_features))
    sites.sort(key=lambda site: (site.layer, site.name))
    return {site.name: site for site in sites}


def _check_config(path: Path, config: Given) -> None:
    kind = config.get("peft_type")
    if str(kind).upper() != "LORA":
        raise AdapterError(f"{path}: peft_type is {kind!r}; only LoRA adapters can be aggregated.")
    for key, why in _ALTERED.items():
        if config.get(key):
            raise AdapterError(
                f"{path} has {key} set: {why}; only plain LoRA adapters can be aggregated."
            )
    if config.get("bias", "none") not in ("none", None):
        raise AdapterError(
            f"{path}: bias is {config['bias']!r}; only adapters without biases can be aggregated."
        )
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_BASE_CHANGING):
        raise AdapterError(
            f"{path}: init_lora_weights is {start!r}, which changes the base weights too; convert "
            f"the adapter to "
            "plain LoRA first (path_initial_model_for_weight_conversion of PEFT's save_pretrained)."
        )
    rank = config.get("r")
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise AdapterError(f"{path}: r is {rank!r}; it must be a whole number of at least 1.")
    _number(path, "lora_alpha", config.get("lora_alpha"))
    for key in ("rank_pattern", "alpha_pattern"):
        _check_patterns(path, key, config.get(key) or {})


def _check_patterns(path: Path, key: str, patterns: object) -> None:
    if not isinstance(patterns, dict):
        raise AdapterError(f"{path}: {key} must be a table of patterns and numbers.")
    for pattern, value in patterns.items():
        _number(path, f"{key} '{pattern}'", value)
        try:
            re.compile(pattern)
        except re.error as error:
            raise AdapterError(
                f"{path}: {key} '{pattern}' is no regular expression ({error})."
            ) from None


def _number(path: Path, what: str, value: object) -> None:
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf:
        return
    raise AdapterError(f"{path}: {what} is {value!r}; it must be a number above 0.")


class _Contents:
    """What an adapter file's header names, one tensor after the other."""

    def __init__(self, path: Path):
        self.path = path
        #: site -> half -> the tensor's name
        self.halves: dict[str, dict[str, str]] = {}
        self.shapes: dict[str, list[int]] = {}
        self.others: dict[str, Saved] = {}
        self.dtypes: set[str] = set()

    def add(
        self,
        name: str,
        shape: list[int],
        dtype: str,
    ) -> None:
        """Raises ``AdapterError`` for a tensor that no rule can take."""
        plain = _plain(self.path, name)
        magnitude = _MAGNITUDE.match(plain)
        if magnitude is not None:
            self._add_half(magnitude["site"], "M", name, dtype)
            self.shapes[name] = shape
            return
        found = _PAIR.match(plain)
        if found is not None:
            self._add_half(
                found["site"],
                found["half"],
                name,
                dtype,
            )
            self.shapes[name] = shape
            return
        if "lora_" in name:
            raise AdapterError(f"{self.path}: '{name}' is no plain LoRA factor of a linear layer.")
        self.others[plain] = Saved(self.path, name, tuple(shape))

    def _add_half(self, site: str, half: str, name: str, dtype: str) -> None:
        if dtype not in _FLOATS:
            raise AdapterError(f"{self.path}: '{name}' is stored as {dtype}; save it as float32.")
        self.dtypes.add(dtype)
        if site.endswith(".base_layer"):
            raise AdapterError(
                f"{self.path}: '{name}' was trained around another adapter, which is not in the "
                "file; merge that one into the base model first."
            )
        pair = self.halves.setdefault(site, {})
        if half in pair:
            raise AdapterError(
                f"{self.path} holds two adapters: '{pair[half]}' and '{name}'; keep one."
            )
        pair[half] = name


def _places(
    folder: Path,
    config: Given,
) -> tuple[dict[str, FactorNames], dict[str, Saved], set[str]]:
    path = folder / WEIGHTS
    contents = _Contents(path)
    try:
        with safe_open(path, "pt") as file:
            for name in sorted(file.keys()):
                view = file.get_slice(name)
                contents.add(name, list(view.get_shape()), view.get_dtype())
    except FileNotFoundError:
        raise AdapterError(f"{path} does not exist; {folder} is no adapter directory.") from None
    except (OSError, SafetensorError) as error:
        raise AdapterError(
            f"{path} is not a whole safetensors file ({error}); it was cut short or altered."
        ) from error
    if not contents.halves:
        raise AdapterError(f"{path} holds no LoRA tensors (lora_A, lora_B).")
    places = {}
    for site, pair in contents.halves.items():
        places[site] = _place(path, site, pair, contents.shapes, config)
    others = contents.others | _own_head(folder)
    return places, others, contents.dtypes


def _plain(path: Path, name: str) -> str:
    try:
        return plain_name(name)
    except AdapterError as error:
        raise AdapterError(f"{path}: {error}") from None


def _own_head(folder: Path) -> dict[str, Saved]:
    """The tensors of our own head file, where there is one."""
    path = folder / HEAD
    if not path.exists():
        return {}
    try:
        with safe_open(path, "pt") as file:
            found = {}
            for name in sorted(file.keys()):
                shape = file.get_slice(name).get_shape()
                called = f"{HEAD}/{name}"
                found[called] = Saved(path, name, tuple(shape))
            return found
    except (OSError, SafetensorError) as error:
        raise AdapterError(
            f"{path} is not a whole safetensors file ({error}); it was cut short or altered."
        ) from error


def _place(
    path: Path,
    site: str,
    pair: Mapping[str, str],
    shapes: Mapping[str, list[int]],
    config: Given,
) -> FactorNames:
    for half, other in ("AB", "BA"):
        if half not in pair:
            raise AdapterError(
                f"{path}: '{pair[other]}' has no lora_{half}; one half of the pair is missing."
            )
    if bool(config.get("use_dora")) != ("M" in pair):
        raise AdapterError(
            f"{path}: use_dora is {bool(config.get('use_dora'))} in {CONFIG}, which is not what "
            f"'{site}' has (lora_magnitude_vector)."
        )
    a = shapes[pair["A"]]
    b = shapes[pair["B"]]
    for half, shape in (("A", a), ("B", b)):
        if len(shape) != 2 or 0 in shape:
            raise AdapterError(
                f"{path}: '{pair[half]}' has shape {shape}; it must be a matrix, as of a linear "
                f"layer."
            )
    magnitude = pair.get("M")
    if magnitude is not None and shapes[magnitude] != [b[0]]:
        raise AdapterError(
            f"{path}: '{magnitude}' has shape {shapes[magnitude]}, and the layer {b[0]} outputs."
        )
    r = _patterned(config, "r", "rank_pattern", site)
    rank = int(r)
    if a[0] != rank:
        raise AdapterError(
            f"{path}: '{pair['A']}' has shape {a}, but its rank is {rank} in {CONFIG}."
        )
    if b[1] != rank:
        raise AdapterError(
            f"{path}: '{pair['B']}' has shape {b}, but its rank is {rank} in {CONFIG}."
        )
    lora_alpha = _patterned(config, "lora_alpha", "alpha_pattern", site)
    rslora = bool(config.get("use_rslora"))
    return FactorNames(
        A=pair["A"],
        B=pair["B"],
        rank=rank,
        scale=scale_of(float(lora_alpha), rank, rslora),
        shape=(b[0], a[1]),
        M=magnitude,
    )


def _patterned(config: Given, key: str, patterns: str, site: str) -> float:
    """As PEFT resolves it: the first pattern that matches the end of the module's path."""
    found: float = config[key]
    by_pattern: Mapping[str, float] = config.get(patterns) or {}
    for pattern, value in by_pattern.items():
        if re.match(rf"(.*\.)?({pattern})$", site):
            return value
    return found
