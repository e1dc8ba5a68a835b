"""Base models: any Hugging Face encoder or decoder, by embedded name, hub name or local folder."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from fedgrove.adapters.adapter import Adapter, Site
from fedgrove.federation.tasks import TASKS
from fedgrove.ground.errors import ModelError
from fedgrove.ground.seeds import derive
from fedgrove.interop import quantise
from fedgrove.interop.embedded_models import CONVERTED, model_folder
from fedgrove.interop.hub import fetched
from fedgrove.interop.targets import find_sites, layer_index

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: models that the package itself brings along, under ``fedgrove/weights``
SHIPPED_MODELS = ("grove-vit",)

#: embedded models and the hub names of the same weights
EMBEDDED_MODELS = {
    "minilm": "sentence-transformers/all-MiniLM-L6-v2",
    "mpnet-base": "sentence-transformers/all-mpnet-base-v2",
    **{name: known.upstream for name, known in CONVERTED.items()},
}

#: where the config keeps its dropout rates; the base runs without dropout (docs/limits.md)
_DROPOUTS = (
    "hidden_dropout_prob", "attention_probs_dropout_prob", "attention_dropout", "hidden_dropout", "activation_dropout",
    "dropout", "dropout_rate", "resid_pdrop", "embd_pdrop", "attn_pdrop", "seq_classif_dropout", "classifier_dropout",
    "pooler_dropout", "layerdrop", "embedding_dropout", "mlp_dropout", "classifier_pdrop", "ffn_dropout",
)  # fmt: skip

#: models whose positions start after the padding token's own
SHIFTED = (
    "camembert", "data2vec-text", "ibert", "lilt", "longformer", "luke", "markuplm", "mpnet", "roberta",
    "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod",
)  # fmt: skip


#: how a model is read: our head on its states, its own head, or its own output layer: that of a
#: decoder, or of an encoder-decoder
HeadKind = Literal["pooled", "stock", "lm", "seq2seq"]

#: the transformers class of a kind; a stock head's is the task's
_AUTO = {
    "pooled": "AutoModel",
    "lm": "AutoModelForCausalLM",
    "seq2seq": "AutoModelForSeq2SeqLM",
}
#: how the class of a checkpoint that writes texts is called
_WRITERS = {
    "lm": ("ForCausalLM", "LMHeadModel"),
    "seq2seq": ("ForConditionalGeneration", "T5WithLMHeadModel", "MTModel"),
}


@dataclass(eq=False)
class Base:
    """A frozen base model with its adapted sites. One per process, whatever the number of
    clients.
    """

    name: str
    upstream: str  # the name that PEFT configurations carry
    model: Any  # a transformers PreTrainedModel
    processor: Any  # turns rows into inputs: a tokenizer, or an image processor
    sites: dict[str, Site]
    hidden: int
    head: HeadKind  # of a language model its own output layer, which is frozen
    head_modules: tuple[str, ...]  # the stock head's modules, as PEFT's modules_to_save names them
    stock_head: dict[str, Tensor]  # their initial values, by parameter name
    dtype: torch.dtype
    device: torch.device
    notes: tuple[str, ...] = ()  # what a user may want to know of how it was loaded
    start: Adapter = field(default_factory=dict)  # of ``model.adapter``, which is in the weights
    start_head: dict[str, Tensor] = field(default_factory=dict)  # its head, where it has one

    @property
    def adapter_dtype(self) -> torch.dtype:
        """Adapters and heads train in float32 whatever the base's precision (float64 with a float64
        base).
        """
        if self.dtype == torch.float64:
            return torch.float64
        return torch.float32

    @property
    def pad_id(self) -> int:
        return int(getattr(self.processor, "pad_token_id", None) or 0)

    @property
    def layers(self) -> tuple[int, ...]:
        """The layer indices of the sites, shallow to deep."""
        return tuple(sorted({site.layer for site in self.sites.values()}))


def resolve_name(name: str) -> str:
    """Where ``from_pretrained`` finds the model: a folder of the package or the cache for an
    embedded name.
    """
    if name in SHIPPED_MODELS:
        return str(Path(__file__).parents[1] / "weights" / name)
    if name in EMBEDDED_MODELS:
        return str(model_folder(name))
    return name


def from_pretrained(
    factory: Any,
    name: str,
    revision: str | None,
    **options: Any,
) -> Any:
    """``factory.from_pretrained`` of a model by the name that a job gives. Raises ``ModelError``."""
    return fetched(factory, name, resolve_name(name), revision, **options)


def load_tokenizer(name: str, revision: str | None = None) -> Any:
    from transformers import AutoTokenizer

    tokenizer = from_pretrained(AutoTokenizer, name, revision)
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise ModelError(
                f"model.name: the tokenizer of '{name}' has neither a padding nor an end token."
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_image_processor(name: str, revision: str | None = None) -> Any:
    from transformers import AutoImageProcessor

    # "pil": the other kind needs torchvision, and resizes a little differently
    return from_pretrained(AutoImageProcessor, name, revision, backend="pil")


def load_processor(
    name: str,
    revision: str | None,
    task: str,
    config: Any = None,
) -> Any:
    """What turns the task's rows into the model's inputs. Raises ``ModelError`` where the model
    reads other things.
    """
    config = config or load_config(name, revision)
    images = hasattr(config, "num_channels") or hasattr(config, "image_size")
    wanted = reads_images(task)
    if images != wanted and (images or hasattr(config, "vocab_size")):
        reads, other = (
            ("images, not text", "minilm") if images else ("text, not images", "grove-vit")
        )
        raise ModelError(
            f"model.name: '{name}' reads {reads}; for data.task = {task!r} choose another model, "
            f"such as {other!r}."
        )
    if wanted:
        return load_image_processor(name, revision)
    return load_tokenizer(name, revision)


def reads_images(task: str) -> bool:
    """Whether a task's rows are images."""
    return TASKS.find(task).reads == "images"


def model_class(task: str, head: str) -> Any:
    """The transformers class of a task's model with a kind of head."""
    import transformers

    name = _AUTO.get(head) or TASKS.find(task).stock.auto
    return getattr(transformers, name)


def head_kind(config: Any, wanted: HeadKind) -> HeadKind:
    """How a model of this configuration is read where ``wanted`` is asked of it: what writes, by what
    it is.
    """
    if wanted not in _WRITERS:
        return wanted
    if getattr(config, "is_encoder_decoder", False):
        return "seq2seq"
    return "lm"


def load_base(
    name: str,
    *,
    revision: str | None = None,
    task: str = "classify-text",
    head: HeadKind = "pooled",
    classes: int = 2,
    targets: Any = "auto",
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
    gradient_checkpointing: bool = False,
    quantize: quantise.Bits = "none",
) -> Base:
    """Load and freeze a base for a task. Raises ``ModelError`` in one sentence."""
    config = load_config(name, revision)
    head = head_kind(config, head)
    writes = head in _WRITERS
    _refuse_unfit(name, config, writes)
    if writes:
        _check_writer(name, config, head)
        config.use_cache = False  # a cache is of use in generation alone, which asks for one
    placed = quantise.options(quantize, device, dtype)
    processor = load_processor(name, revision, task, config)
    for key in _DROPOUTS:
        if isinstance(getattr(config, key, None), float):
            setattr(config, key, 0.0)
    notes: tuple[str, ...] = ()
    if head == "stock":
        notes = _new_head(name, config, classes)
        config.num_labels = classes
        if not reads_images(task):
            config.pad_token_id = processor.pad_token_id
    with torch.random.fork_rng(devices=[]):
        # weights that the checkpoint lacks are drawn here
        torch.manual_seed(derive(seed, "stock head"))
        model, drawn = _loaded(
            name,
            revision,
            task,
            head,
            config=config,
            dtype=dtype,
            **placed,
        )
    if writes:
        plain = type(model.generation_config)
        # its own sampling and penalties are not ours
        model.generation_config = plain(decoder_start_token_id=_started_by(name, model, head))
    model.requires_grad_(False)
    model.eval()
    if gradient_checkpointing:
        _checkpointed(name, model)
    if not placed:
        model.to(device)
    modules: tuple[str, ...] = ()
    stock: dict[str, Tensor] = {}
    if head == "stock":
        modules = (*own_modules(model), *drawn)
        notes += tuple(
            f"{name} has no '{part}'; a new one is drawn, as part of the head." for part in drawn
        )
        stock = _kept_wide(model, modules, dtype)
    of_the_head = tuple(f"{module}." for module in modules)
    every = find_sites(model, targets)
    sites = {place: site for place, site in every.items() if not place.startswith(of_the_head)}
    if writes:
        _check_tied(model, sites)
    return Base(
        name=name,
        upstream=EMBEDDED_MODELS.get(name, name),
        model=model,
        processor=processor,
        sites=sites,
        hidden=_hidden_size(name, config),
        head=head,
        head_modules=modules,
        stock_head=stock,
        dtype=dtype,
        device=torch.device(device),
        notes=notes,
    )


def _refuse_unfit(
    name: str,
    config: Any,
    writes: bool,
) -> None:
    """Raise ``ModelError`` for an encoder-decoder that is not to write, and for a model that hides
    patches at random.
    """
    if getattr(config, "is_encoder_decoder", False) and not writes:
        raise ModelError(
            f"model.name: '{name}' is an encoder-decoder, which writes texts (data.task = "
            '"generate"); for other tasks choose an encoder or a decoder.'
        )
    if getattr(config, "mask_ratio", 0):
        raise ModelError(
            f"model.name: '{name}' hides patches at random in every pass (mask_ratio = "
            f"{config.mask_ratio}), so no two "
            "measures agree; choose another model, or a copy whose config.json has mask_ratio 0."
        )


def _checkpointed(name: str, model: PreTrainedModel) -> None:
    """The model as it trains in little memory. Raises ``ModelError`` where it cannot."""
    if not model.supports_gradient_checkpointing:
        raise ModelError(
            f"train.gradient_checkpointing: '{name}' does not support it; set it to false."
        )
    _checkpoint_activations(model)
    model.train()  # transformers checkpoints in training mode only; every dropout rate is 0


def own_modules(model: PreTrainedModel) -> list[str]:
    """The modules with parameters that stand beside the model's body: its head, by name."""
    found: list[str] = []
    for name, module in model.named_children():
        if name != model.base_model_prefix and any(True for _ in module.parameters()):
            found.append(name)
    return found


def _kept_wide(
    model: PreTrainedModel,
    modules: tuple[str, ...],
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    """The head's tensors [any shape], by name, in at least float32, and so its modules compute."""
    wide = torch.float32
    if dtype == torch.float64:
        wide = torch.float64
    found: dict[str, Tensor] = {}
    for name in modules:
        module = model.get_submodule(name)
        for key, value in module.named_parameters():
            found[f"{name}.{key}"] = value.detach().to("cpu", wide).clone()
        module.to(wide)
        module.register_forward_pre_hook(partial(_widen, wide))
    return found


def _new_head(
    name: str,
    config: Any,
    classes: int,
) -> tuple[str, ...]:
    """A sentence where the checkpoint has a classifier of another number of classes."""
    has_one = any("Classification" in str(kind) for kind in config.architectures or [])
    if not has_one or config.num_labels == classes:
        return ()
    return (
        f"The head of {name} is for {config.num_labels} classes; for these {classes} a new one is "
        "drawn.",
    )


def _loaded(
    name: str,
    revision: str | None,
    task: str,
    head: str,
    **options: Any,
) -> tuple[Any, tuple[str, ...]]:
    """The model, its head drawn anew where the checkpoint's has another shape; and the modules below
    the head that the checkpoint lacks (BERT's pooler), which are as new as the head. Raises
    ``ModelError`` where anything else is missing or of another shape.
    """
    kind = model_class(task, head)
    if head != "stock":
        return from_pretrained(kind, name, revision, **options), ()
    model, told = from_pretrained(
        kind,
        name,
        revision,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
        **options,
    )
    for key, *_ in told["mismatched_keys"]:
        if key.startswith(f"{model.base_model_prefix}."):
            raise ModelError(
                f"model.name: the weights of '{name}' do not have the shapes that its config.json "
                f"says ({key.removeprefix(model.base_model_prefix + '.')}); repair the checkpoint."
            )
    body = f"{model.base_model_prefix}."
    missing = sorted(key for key in told["missing_keys"] if key.startswith(body))
    for key in missing:
        if layer_index(key) is not None:
            raise ModelError(
                f"model.name: '{name}' lacks weights of its layers ({key}); repair the checkpoint."
            )
    return model, tuple(dict.fromkeys(key.rpartition(".")[0] for key in missing))


def _hidden_size(name: str, config: Any) -> int:
    """Of the states that the head sees. A model of two towers (CLIP) has none of its own."""
    size = getattr(config, "hidden_size", None)
    if not isinstance(size, int):
        raise ModelError(
            f"model.name: '{name}' ({type(config).__name__}) has no one hidden size for a head; "
            f"choose an encoder of "
            "one part, such as its text or vision model alone."
        )
    return size


def _started_by(
    name: str,
    model: Any,
    head: HeadKind,
) -> int | None:
    """The token that an encoder-decoder's texts start from; None of a decoder, whose prompt is that.
    Raises ``ModelError`` where the checkpoint does not say.
    """
    if head == "lm":
        return None
    for config in (model.config, model.generation_config):
        token = getattr(config, "decoder_start_token_id", None)
        if token is not None:
            return int(token)
    raise ModelError(
        f"model.name: '{name}' does not say which token its texts start from; give its config.json a "
        "decoder_start_token_id."
    )


def _check_writer(
    name: str,
    config: Any,
    head: HeadKind,
) -> None:
    """Encoders load as language models too, with an output layer of noise or one that looks
    ahead.
    """
    kinds = [str(kind) for kind in getattr(config, "architectures", None) or []]
    if kinds and not any(kind.endswith(_WRITERS[head]) for kind in kinds):
        raise ModelError(
            f"model.name: '{name}' is a {kinds[0]}, which does not write text; for data.task = "
            f'"generate" choose a '
            'decoder with its output layer, such as "minimind2-small".'
        )


def _check_tied(model: Any, sites: dict[str, Site]) -> None:
    """An adapter that is merged into a tied output layer would change the input embedding as
    well.
    """
    embedding = model.get_input_embeddings().weight
    for name in sites:
        if model.get_submodule(name).weight is embedding:
            raise ModelError(
                f"lora.targets: '{name}' of {type(model).__name__} shares its weights with the "
                f"input embedding, so it "
                "cannot be adapted; leave it out."
            )


def _checkpoint_activations(model: Any) -> None:
    """Without re-entrance, so that a frozen embedding needs no gradient; transformers 5.23 renamed
    the call.
    """
    options = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)


def _widen(
    dtype: torch.dtype,
    module: nn.Module,
    args: tuple[Any, ...],
) -> tuple[Any, ...]:
    """The stock head computes in the head's precision, whatever the base's."""
    return tuple(
        a.to(dtype) if isinstance(a, Tensor) and a.is_floating_point() else a for a in args
    )


def load_config(name: str, revision: str | None = None) -> Any:
    from transformers import AutoConfig

    folder = Path(name)
    if (folder / "adapter_config.json").exists() and not (folder / "config.json").exists():
        raise ModelError(
            f"model.name: '{name}' is an adapter, not a model; to train on from it, name its base "
            f"here and the adapter as model.adapter."
        )
    return from_pretrained(AutoConfig, name, revision)


def first_position(config: Any) -> int:
    """What a model calls its first position: RoBERTa and its kin count on from the padding
    token's.
    """
    if getattr(config, "model_type", "") not in SHIFTED:
        return 0
    return int(getattr(config, "pad_token_id", None) or 0) + 1


def longest_input(config: Any) -> int | None:
    """The most tokens that the model's positions allow, if it says so."""
    limit = getattr(config, "max_position_embeddings", None)
    if limit is None:
        return None
    return int(limit) - first_position(config)
