"""Names of tensors in other people's adapter files, freed of what compilers and launchers put in.

PEFT writes ``base_model.model.SITE.lora_A.weight``. A model that was compiled, wrapped for several
devices or sharded when it was saved has the wrapper's name in front of it or inside it, and PEFT
then loads the file without a word as an adapter that does nothing.
"""

from __future__ import annotations

from fedgrove.ground.errors import AdapterError

#: What a wrapper calls the module that it wraps: torch.compile, FSDP, activation checkpointing,
#: DeepSpeed and Lightning.
WRAPPERS = (
    "_orig_mod",
    "_fsdp_wrapped_module",
    "_checkpoint_wrapped_module",
    "_forward_module",
)
#: What DistributedDataParallel and DeepSpeed call what they wrap, in front or inside, where it is no
#: layer: no model of transformers has a part of these names.
NAMELESS = ("module", "model_wrapped")


def plain_name(name: str) -> str:
    """The tensor's name in the base model, without PEFT's prefix, what a launcher put before it,
    and wrappers.

    Raises ``AdapterError`` where a part is of a wrapper that is not known here.
    """
    parts = [part for part in name.split(".") if part not in WRAPPERS]
    bare = [part for part in parts if part not in NAMELESS]
    if len(bare) > 2:  # else it is the layer's own name
        parts = bare
    for start in range(1, len(parts) - 2):
        if parts[start : start + 2] == ["base_model", "model"]:
            parts = parts[start:]
            break
    while parts[:2] == ["base_model", "model"]:
        parts = parts[2:]
    for part in parts:
        if part.startswith("_"):
            raise AdapterError(
                f"'{name}' has the part '{part}' of a wrapper that is not known here; unwrap the "
                "model before it is saved."
            )
    return ".".join(parts)
