"""A party of texts: the kernel on its own frozen base, with LoRA.

What an answer asks for becomes a task of the kernel: the examples of a batch carry their part of it,
the "logits" are the party's share, and the output weights are the assembly's head.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from fedgrove.adapters.adapter import fresh, scale_of
from fedgrove.adapters.assembly import Assembly, Extra, Term
from fedgrove.adapters.private import is_private, seal, unseal
from fedgrove.adapters.tree import Tree
from fedgrove.federation.tasks.base import Batch, Example
from fedgrove.federation.tasks.classify_text import ClassifyText
from fedgrove.ground.errors import DataError, JobError
from fedgrove.ground.plain import Plain
from fedgrove.interop.models import Base, load_base, load_config, longest_input
from fedgrove.job.sections import TrainSection
from fedgrove.methods.contract import Step
from fedgrove.training.kernel import Kernel
from fedgrove.training.loop import Clock
from fedgrove.vertical.job import PartySection, VerticalTrainSection
from fedgrove.vertical.messages import Answer
from fedgrove.vertical.party import Effort, Party, Rows, loss

TERM = "own"
HEAD = "head.weight"


@dataclass(frozen=True)
class Asked(ClassifyText):
    """What the server asks of a batch, as a task; an example's "label" is its row of the answer, by the
    answer's fields, and of the party's first share.
    """

    effort: Effort = field(default=Effort(1, 1.0, 1.0, 0.0, 1.0))
    PARTS: ClassVar[tuple[str, ...]] = ("dual", "rest", "first")

    def label_tensors(self, examples: Sequence[Example]) -> Batch:
        """As in ReadsText: each part [b, c]."""
        found: Batch = {}
        for part in self.PARTS:
            rows = [example["label"][part] for example in examples if part in example["label"]]
            if rows:
                found[part] = torch.stack(rows)
        return found

    def head_logits(
        self, states: Float[Tensor, "b h"], head: Mapping[str, Tensor]
    ) -> Float[Tensor, "b c"]:
        """The party's share; its embedding where it is asked by a gradient alone."""
        if not head:
            return states
        return states @ head["weight"].to(states.dtype).T

    def loss(self, logits: Float[Tensor, "b c"], batch: Batch) -> Float[Tensor, ""]:
        """As in Task."""
        answer = Answer(batch["dual"], batch.get("rest"))
        return loss(logits, batch.get("first"), answer, self.effort)


class Texts(Party):
    """A column of texts.

    Args:
        rows: of the text task, n.
        classes: c, where it owns its output weights; else None.
        seed: the run's.
    """

    def __init__(
        self,
        name: str,
        effort: Effort,
        section: PartySection,
        rows: Sequence[Plain],
        *,
        classes: int | None,
        train: VerticalTrainSection,
        seed: int,
        generator: torch.Generator,
        base: Base | None = None,
    ):
        super().__init__(name, effort)
        self.seed = seed
        self.base = base or _base(name, section, train.device)
        task = Asked((), section.max_length, effort=effort)
        options = TrainSection(
            optimizer="sgd",
            lr=effort.lr,
            head_lr=effort.head_lr,
            weight_decay=effort.decay,
            clip=0.0,
            batch_size=train.batch_size,
            local_steps=effort.steps,
        )
        self.kernel = Kernel(self.base, task, options)
        try:
            self.examples = task.encode(rows, self.base.processor)
        except DataError as error:
            raise DataError(f"party {name!r}: {error}") from error
        scale = scale_of(section.alpha or 2.0 * section.rank, section.rank, rslora=False)
        drawn = fresh(
            self.base.sites, section.rank, scale, generator, dtype=self.base.adapter_dtype
        )
        self.adapter = {site: factors.map(seal) for site, factors in drawn.items()}
        self.weight = None
        if classes is not None:
            zeros = torch.zeros(self.width, classes, dtype=self.base.adapter_dtype)
            self.weight = seal(zeros)

    @property
    def width(self) -> int:
        """As in Party."""
        return self.base.hidden

    def embed(self, rows: Rows) -> Float[Tensor, "b h"]:
        """As in Party."""
        chosen = [self.examples[row] for row in rows]
        return self.kernel.features(chosen, self._assembly(None)).clone()

    def fit(self, rows: Rows, answer: Answer, *keys: object) -> None:
        """As in Party."""
        own = self.weight is not None
        weight = self.weight if own else answer.weight
        assembly = self._assembly(weight)
        parts = {"dual": answer.dual, "rest": answer.rest, "first": None}
        if self.effort.damp and weight is not None:
            parts["first"] = self.embed(rows) @ unseal(weight)
        asked = []
        for number, row in enumerate(rows):
            label = {part: values[number] for part, values in parts.items() if values is not None}
            asked.append({**self.examples[row], "label": label})
        clock = Clock(self.seed, (*keys, self.name))
        trained = self.kernel.train(Step(assembly), asked, clock).assembly
        (term,) = trained.terms
        self.adapter = term.adapter
        if own:
            self.weight = trained.extras[HEAD].value.T
            assert is_private(self.weight)

    def _assembly(self, weight: Float[Tensor, "h c"] | None) -> Assembly:
        """The adapter, and output weights where it is to give shares."""
        extras: dict[str, Extra] = {}
        if weight is not None:
            own = self.weight is not None
            extras[HEAD] = Extra(weight.T.contiguous(), train=own, lr=None)
        return Assembly((Term(TERM, self.adapter, home="client"),), extras=extras)

    def store(self) -> Tree:
        """As in Party."""
        return {"adapter": dict(self.adapter), "weight": self.weight}

    def restore(self, store: Tree) -> None:
        """As in Party."""
        self.adapter = store["adapter"]
        self.weight = store["weight"]


def _base(name: str, section: PartySection, device: str) -> Base:
    limit = longest_input(load_config(section.model))
    if limit is not None and section.max_length > limit:
        raise JobError(
            f"party.{name}.max_length = {section.max_length} is more than {section.model} reads; set it "
            f"to {limit} or less."
        )
    base = load_base(section.model, device=device)
    smallest = min(min(site.in_features, site.out_features) for site in base.sites.values())
    if section.rank > smallest:
        raise JobError(
            f"party.{name}.rank = {section.rank} is above {smallest}, the smallest side of an adapted "
            f"layer of {section.model}; lower it."
        )
    return base
