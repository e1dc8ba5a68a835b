"""A client's model as its user meets it: loaded from an adapter directory, it predicts."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from fedgrove.adapters import Adapter, Assembly, Extra, Term
from fedgrove.adapters.assembly import Mix
from fedgrove.adapters.routers import ROUTERS
from fedgrove.aggregate.foreign import card_of, is_adapter, opened, says_which, tidied
from fedgrove.federation.readers import Row
from fedgrove.federation.tasks import TASKS, Example
from fedgrove.federation.tasks.base import HeadedTask
from fedgrove.federation.tasks.seq2seq import as_read
from fedgrove.ground.errors import AdapterError, DataError, ModelError, RunError
from fedgrove.ground.plain import Plain
from fedgrove.interop import assembly_file, peft
from fedgrove.interop.models import EMBEDDED_MODELS, HeadKind, load_base
from fedgrove.methods.head import PREFIX
from fedgrove.methods.protocols import mixes
from fedgrove.methods.registry import method_class
from fedgrove.runs.parts import evaluator
from fedgrove.training.kernel import Kernel
from fedgrove.training.measured import measured
from fedgrove.training.readers import Found
from fedgrove.use.questions import answered, questions

POOL = "pool"  # the method that the card of a pool names


@dataclass(frozen=True)
class Told:
    """For each row its answer, and how likely each label is, {} where answers have no scores."""

    answers: list[Any]
    scores: list[dict[str, float]]


class ClientModel:
    """A base with one client's adapter and head. Made by ``load``."""

    def __init__(
        self,
        kernel: Kernel,
        assembly: Assembly,
        card: Plain,
    ):
        self.kernel, self.assembly, self.card = kernel, assembly, card
        self.labels: tuple[str, ...] = tuple(card["labels"])
        #: whether nothing that was trained turns states into classes
        self.headless = card.get("head_trained") is False or (
            card["head"] == "pooled" and not assembly.extras
        )

    def logits(self, texts: Sequence[Any]) -> Tensor:
        """Logits ``[texts, classes]`` in float32, columns in the order of ``labels``.

        Of a language model ``[prompts, vocabulary]``: about the first token of the answer.
        Where the model reads images, ``texts`` are their files' paths or bytes, or PIL images.
        """
        return self.answers(questions(self.kernel.task, texts))

    def answers(self, rows: Sequence[Row]) -> Tensor:
        """As ``logits``, [rows, classes], of checked rows, whose labels do not matter."""
        return self._read(rows)[0]

    def asked(self, rows: Sequence[Row]) -> Told:
        """What the model says of checked rows, whose answers do not matter."""
        task = self.kernel.task
        logits, examples = self._read(rows)
        answers = task.told_of(logits, examples)
        if not task.classifies:
            return Told(answers, [{} for _ in answers])
        return Told(answers, task.scored(logits))

    def _read(self, rows: Sequence[Row]) -> tuple[Tensor, list[Example]]:
        """As ``answers``, [rows, classes] or [rows, tokens, classes], and what the rows became."""
        self._check_head()
        examples = self.kernel.task.encode(rows, self.kernel.base.processor)
        return self.kernel.logits(self.assembly, examples).clone(), examples

    def probabilities(self, texts: Sequence[Any]) -> Tensor:
        """As ``logits``, [texts, classes], in float32."""
        return self.kernel.task.probabilities(self.logits(texts).float())

    def predict(self, texts: Sequence[Any]) -> list[Any]:
        """The most likely label of each text (or image), or what else the task answers; what a
        language model writes after each prompt.
        """
        task = self.kernel.task
        rows = questions(task, texts)
        if task.written(rows):
            return self.generate(texts)
        return self.asked(rows).answers

    def generate(self, prompts: Sequence[Any], *, max_new_tokens: int | None = None) -> list[str]:
        """What a language model writes after each prompt, greedily; a prompt is a text, or a list
        of messages.

        ``max_new_tokens`` is the job's ``data.max_new_tokens`` unless given. Raises
        ``AdapterError`` for a classifier.
        """
        task = self.kernel.task
        if not task.writes:
            raise AdapterError(
                f"{self.card['model']} was trained for the task {task.name!r}; it cannot generate "
                "text."
            )
        if max_new_tokens is not None and (
            not isinstance(max_new_tokens, int) or max_new_tokens < 1
        ):
            raise DataError(
                f"max_new_tokens = {max_new_tokens!r} is no number of tokens; set it to 1 or more"
            )
        examples = task.encode(questions(task, prompts), self.kernel.base.processor)
        return self.kernel.generate(self.assembly, examples, most=max_new_tokens)

    def evaluate(self, rows: Sequence[Plain]) -> dict[str, float]:
        """The task's measures on rows ``{"text": …, "label": …}``, or with the columns of another
        task.
        """
        self._check_head()
        task = self.kernel.task
        return self.kernel.evaluate(
            self.assembly,
            task.encode(answered(task, rows), self.kernel.base.processor),
        )

    def measures(self, rows: Sequence[Plain], more: Sequence[str] = ()) -> Plain:
        """As ``evaluate``, with every metric of the task, and ``more`` by their names; by class
        where a metric has a value for each, None where one is not defined.
        """
        self._check_head()
        task = self.kernel.task
        examples = task.encode(answered(task, rows), self.kernel.base.processor)
        answers: Found = {}
        found: Plain = dict(self.kernel.evaluate(self.assembly, examples, answers))
        return found | measured(task, answers, examples, more)

    def _check_head(self) -> None:
        if self.headless:
            raise AdapterError(
                f"The adapter of {self.card['model']} has no head that was trained, so it names no "
                "classes: use one with its head (modules_to_save, head.safetensors, or a client's "
                "own); without it, it can be merged and exported."
            )


def load(
    folder: str | Path,
    *,
    device: str = "cpu",
    dtype: str | None = None,
    labels: Sequence[str] | None = None,
    base: str | None = None,
) -> ClientModel:
    """A model from an adapter directory: of a run, of ``fedgrove export`` (merged ones too), of
    ``fedgrove aggregate``, or of PEFT.

    ``dtype`` is the base's precision, by default the one the run used, so that the logits are the
    run's; float32 for an adapter that was not trained here. ``labels`` names the classes in the
    order of the head's outputs, ``base`` the base model, where the directory says neither or is
    wrong. Raises ``AdapterError`` where the directory is incomplete, ``ModelError`` where the base
    cannot be loaded.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise RunError(
            f"{folder} does not exist; name an adapter directory such as RUN/adapters/CLIENT."
        )
    if (folder / "summary.json").exists() or (folder / "job.toml").exists():
        raise RunError(
            f"{folder} is a run; name one of its adapters, such as "
            f"{folder / 'adapters' / 'CLIENT'}."
        )
    if not is_adapter(folder):
        raise AdapterError(
            f"{folder / peft.CONFIG} does not exist; {folder} is not an adapter directory."
        )
    card: Plain = {}
    if (folder / peft.CARD).exists():
        card = peft.read_json(folder / peft.CARD)
    merged = bool(card.get("merged"))
    adapter: Adapter = {}
    head: dict[str, Tensor] = {}
    own: Assembly | None = None
    if merged or (folder / assembly_file.FILE).exists():
        card = card_of(folder, labels, base)
    if (folder / assembly_file.FILE).exists():
        own = assembly_file.read_assembly(folder, _mixes(card))
        for term in own.terms:
            adapter |= term.adapter  # for its shapes
        adapter |= own.base_delta or {}
    elif merged:
        head = _own_head(folder)
    else:
        found = opened(folder, labels, base)
        adapter, head, card = found.adapter, found.head, found.card
    kernel = kernel_for(
        folder,
        card,
        adapter,
        dtype=dtype,
        device=device,
        merged=merged,
    )
    if card["head"] == "stock" and (merged or not head):
        head = kernel.base.stock_head
    if own is not None:
        return ClientModel(kernel, own, card)
    extras = {PREFIX + name: Extra(value, train=False) for name, value in head.items()}
    terms = (Term("adapter", adapter, train=""),) if adapter else ()
    return ClientModel(kernel, Assembly(terms, extras=extras), card)


def _own_head(folder: Path) -> dict[str, Tensor]:
    """The tensors [any shape] of our own head, by name; {} where the directory has none."""
    if not (folder / peft.HEAD).exists():
        return {}
    return peft.read_tensors(folder / peft.HEAD)


def kernel_for(
    folder: Path,
    card: Plain,
    adapter: Adapter,
    *,
    dtype: str | None = None,
    device: str = "cpu",
    merged: bool = False,
) -> Kernel:
    """The base that a card names, with the sites of an adapter that lies in ``folder``. Raises
    ``AdapterError`` where the two do not fit.
    """
    try:
        with says_which(folder):
            kernel = _kernel(
                str(folder) if merged else card["model"],
                None if merged else card.get("revision"),
                card["head"],
                json.dumps(TASKS.find(card["task"]).from_card(card).card()),
                tuple(sorted(adapter)),
                dtype or card["dtype"],
                device,
            )
    except ModelError as error:
        if not str(error).startswith("lora.targets"):
            raise
        raise AdapterError(
            f"{folder}: the adapter is of another model than {card['model']}, which has no layer "
            f"'{next(iter(adapter))}' that can be adapted."
        ) from error
    for site, factors in adapter.items():
        known = kernel.base.sites[site]
        if (factors.A.shape[1], factors.B.shape[0]) != (known.in_features, known.out_features):
            raise AdapterError(
                f"{folder}: '{site}' does not have the shape of that layer in {card['model']}."
            )
    return kernel


def _mixes(card: Plain) -> Sequence[type[Mix]]:
    """What the terms of a directory in our own format may be mixed by."""
    if card["method"] == POOL:
        return ROUTERS
    return mixes(method_class(card["method"]))


@lru_cache(maxsize=1)
def _kernel(
    name: str,
    revision: str | None,
    head: HeadKind,
    card: str,
    targets: tuple[str, ...],
    dtype: str,
    device: str,
) -> Kernel:
    """The base that the clients of one run share: loaded once for all of them."""
    described = json.loads(card)
    task = TASKS.find(described["task"]).from_card(described)
    base = load_base(
        name,
        revision=revision,
        task=task.name,
        head=head,
        classes=task.outputs,
        targets=targets or "auto",
        dtype=getattr(torch, dtype),
        device=device,
    )
    return evaluator(base, as_read(task, base.head))


def merge(source: Path, out: Path) -> None:
    """Write the base with the adapter folded in as an ordinary model (float32), with its tokenizer
    and head.
    """
    from peft import PeftModel

    from fedgrove.interop.models import from_pretrained, load_processor, model_class
    from fedgrove.interop.stock_heads import as_stock

    card: Plain = {}
    if (source / peft.CARD).exists():
        card = peft.read_json(source / peft.CARD)
    if "why" in card:
        raise AdapterError(f"{source} cannot be merged: {card['why']}")
    if not card.get("head"):
        with TemporaryDirectory() as folder:
            merge(tidied(source, Path(folder) / "adapter"), out)
        return
    revision = card.get("revision")
    options: Plain = {}
    if card["head"] == "stock":  # the trained head replaces the checkpoint's, whatever its shape
        outputs = TASKS.find(card["task"]).from_card(card).outputs
        options = {"num_labels": outputs, "ignore_mismatched_sizes": True}
    kind = model_class(card["task"], card["head"])
    base = from_pretrained(kind, card["model"], revision, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's calls of names that transformers deprecates
        whole = PeftModel.from_pretrained(base.to(torch.float32), str(source)).merge_and_unload()
    task = TASKS.find(card["task"]).from_card(card)
    if task.output_names:
        whole.config.id2label = dict(enumerate(task.output_names))
        whole.config.label2id = {name: index for index, name in enumerate(task.output_names)}
    if task.stock.problem:
        whole.config.problem_type = task.stock.problem
    head = _own_head(source)
    if head and isinstance(task, HeadedTask):
        stock = as_stock(whole, head, model_class(card["task"], "stock"), task)
        if stock is not None:
            whole, head = stock, {}
            card = {**card, "head": "stock"}
    whole.save_pretrained(str(out))
    load_processor(card["model"], revision, card["task"]).save_pretrained(str(out))
    if head:
        peft.save_file(head, out / peft.HEAD, metadata={"format": "pt"})
    card = {
        **card,
        "merged": True,
        "dtype": "float32",
        "upstream": EMBEDDED_MODELS.get(card["model"], card["model"]),
    }
    (out / peft.CARD).write_text(
        peft.json.dumps(card, indent=2, ensure_ascii=False) + "\n",
        encoding="utf-8",
    )
