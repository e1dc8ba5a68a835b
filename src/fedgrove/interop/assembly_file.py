"""Our own format for a client whose model no single LoRA adapter computes: input-dependent mixes of
several terms.

Such an adapter directory holds ``assembly.safetensors`` and ``fedgrove.json`` instead of PEFT's two
files. The first is one tree (``tree.pack``: safetensors with its structure as JSON in the
metadata):

* ``terms``: a list of ``{"name", "adapter": {site: A, B, scale}, "diagonal"?: {site: tensor},
  "unit": bool}``;
* ``extras``: ``{name: tensor}``: the head (``head.weight``, ...), gates, routers, references;
* ``mix``: ``{"name": the class of the method's mix, "parameters": its fields}``;
* ``base_delta``, ``folded``: adapters that belong to the base, where there are any.

``fedgrove.json`` is that of every client, with ``peft`` (false) and ``why`` (one sentence) besides.
The mix is looked up by its name among those that the method names (``Method.mixes``; of a pool,
``adapters.routers``), so that reading a directory runs no foreign code.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from fedgrove.adapters.assembly import Assembly, Extra, Mix, Term
from fedgrove.adapters.private import unseal
from fedgrove.adapters.tree import map_tensors, pack, unpack
from fedgrove.ground.errors import AdapterError
from fedgrove.ground.files import whole_directory
from fedgrove.ground.plain import Given, Plain
from fedgrove.interop.peft import CARD

FILE = "assembly.safetensors"


def needs_own_format(assembly: Assembly) -> bool:
    """Whether no PEFT adapter computes the assembly: its mix depends on the input."""
    return not assembly.mix.linear


def why(assembly: Assembly, method: str) -> str:
    """The reason, as one sentence for the card and for refusals."""
    terms = ", ".join(term.name for term in assembly.terms)
    return (
        f"{method} weighs its LoRA terms ({terms}) anew for each input "
        f"({type(assembly.mix).__name__}), which no PEFT "
        f"adapter and no merged model can; {FILE} holds the terms and what weighs them, for "
        f"fedgrove.load and "
        "fedgrove predict."
    )


def save_assembly(
    folder: Path,
    assembly: Assembly,
    *,
    card: Given,
    beside: Mapping[str, bytes] | None = None,
) -> None:
    """Write one directory, replacing what is there only when all of it is written. The head is
    among the extras; ``beside`` are further files, by name.
    """
    with whole_directory(folder) as partial:
        (partial / FILE).write_bytes(pack(_described(assembly)))
        (partial / CARD).write_text(
            json.dumps(dict(card), indent=2, ensure_ascii=False) + "\n",
            encoding="utf-8",
        )
        for name, content in (beside or {}).items():
            (partial / name).write_bytes(content)


def read_assembly(folder: Path, mixes: Sequence[type[Mix]]) -> Assembly:
    """The assembly of such a directory, with nothing to train. Raises ``AdapterError`` in one
    sentence.
    """
    path = folder / FILE
    try:
        tree = unpack(path.read_bytes())
    except OSError as error:
        raise AdapterError(f"{path} cannot be read ({error}).") from error
    except AdapterError as error:
        raise AdapterError(f"{path}: {error}") from error
    try:
        terms = tuple(
            Term(
                each["name"],
                each["adapter"],
                train="",
                diagonal=each.get("diagonal"),
                unit=each["unit"],
            )
            for each in tree["terms"]
        )
        extras = {name: Extra(value, train=False) for name, value in tree["extras"].items()}
        name, parameters = tree["mix"]["name"], tree["mix"]["parameters"]
        known = {mix.__name__: mix for mix in mixes}
        if name not in known:
            raise AdapterError(
                f"{path} mixes its terms by '{name}', which this version of the method does not "
                f"have."
            )
        return Assembly(
            terms,
            known[name](**parameters),
            extras,
            base_delta=tree.get("base_delta"),
            folded=tree.get("folded"),
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise AdapterError(
            f"{path} lacks a part of its description ({error}); write the adapter again."
        ) from error


def _described(assembly: Assembly) -> Plain:
    mix: Any = assembly.mix
    tree: Plain = {
        "terms": [
            {
                "name": term.name,
                "adapter": dict(term.adapter),
                **({"diagonal": dict(term.diagonal)} if term.diagonal is not None else {}),
                "unit": term.unit,
            }
            for term in assembly.terms
        ],
        "extras": {name: extra.value for name, extra in assembly.extras.items()},
        "mix": {
            "name": type(mix).__name__,
            "parameters": {field.name: getattr(mix, field.name) for field in fields(mix)},
        },
        **({"base_delta": assembly.base_delta} if assembly.base_delta else {}),
        **({"folded": assembly.folded} if assembly.folded else {}),
    }
    described: Plain = map_tensors(tree, unseal)
    return described
