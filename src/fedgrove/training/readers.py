"""How a model's predictions are read off the base. One reader is chosen for a job, by what the
base was loaded with: our head on its states (Pooled), the checkpoint's own head (Stock), or its
output layer (Writer; of an encoder-decoder FromEncoder).

The kernel, the loop and the cohort know readers; readers know tasks. A task says by ``heads`` which
readers it can be read with, and by ``level`` whether our head gets one pooled state of each example
or the states of all its tokens. What it makes of the logits (a loss, sums to measure) is its own,
and its batch may hold any number of label tensors, each with a row for each example: that is how
token classes, spans, several labels or a number come in without another reader.

Examples that are compared (two answers, of which one is preferred) are no other reader either: each
is ``Task.rows_each`` rows of its batch, and what the untouched base says of it is noted on it once
(``Task.prime``).

A fifth reader is a subclass of ``Reader`` that says what a task must give it beside ``Task`` (a
protocol in ``federation.tasks.base``), overrides ``logits``, and ``losses`` where a batch is more
than one pass over the base. It goes into ``READERS`` under the name that ``load_base`` knows its
kind of model by, and the task's ``heads`` names it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import ClassVar, Generic, Protocol, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fedgrove.adapters.routers import Choice
from fedgrove.federation.tasks.base import Batch, Example, HeadedTask, Task, WritingTask
from fedgrove.ground.errors import JobError
from fedgrove.interop.models import Base
from fedgrove.training.hooked import HookedBase
from fedgrove.training.language import EncoderDecoder, LanguageModel
from fedgrove.training.live import LiveAssembly
from fedgrove.training.profile import span

Asked = TypeVar("Asked", bound=Task)
Head = Mapping[str, Tensor]  # its tensors by their own names
Collate = Callable[[Sequence[Example], int], Batch]  # examples and the padding token -> their batch
#: what a model answered, by the number of the example: its logits [*t, c] on the CPU, or the text that it
#: wrote (not for every example: ``WritingTask.chosen``)
Found = dict[int, Tensor | str]


def logits_in(found: Found) -> list[Float[Tensor, "*t c"]]:
    """The logits among the answers, in the order of their examples."""
    return [row for _, row in sorted(found.items()) if isinstance(row, Tensor)]


class Passes(Protocol):
    """Batches of an evaluation, each running on the base while it is looked at."""

    def __call__(
        self,
        live: LiveAssembly,
        examples: Sequence[Example],
        collate: Collate | None = None,
    ) -> Iterator[tuple[list[int], Batch]]:
        """(which examples, their batch) with examples of similar length together; the batch by
        ``collate``, by default the task's own.
        """


class Reader(Generic[Asked]):
    """What all readers have in common. Shapes: b examples, t tokens, h hidden size, c outputs."""

    #: whether one pass may hold several clients' examples, each read with its own client's head
    joins: ClassVar[bool] = True
    #: whether a pass may be one packed row
    packs: ClassVar[bool] = True
    #: whether there is a head that trains
    has_head: ClassVar[bool] = True

    def __init__(self, hooked: HookedBase, task: Asked):
        self.hooked = hooked
        self.base = hooked.base
        self.task = task

    @staticmethod
    def token_bytes(base: Base) -> int:
        """What the logits of a token take in training, beside the base's own activations."""
        return 0

    @property
    def head_sees_features(self) -> bool:
        """Whether the head sees nothing but pooled features, so that it can train on them alone."""
        return False

    @property
    def encoder(self) -> nn.Module:
        """The part of the model that gives last hidden states."""
        encoder: nn.Module = self.base.model.base_model
        return encoder

    def close(self) -> None:
        """Take off the base what the reader put there."""

    def features(self, batch: Batch) -> Float[Tensor, "b h"]:
        """Each example's pooled state, with what the hooks add."""
        states = self._states(batch)
        return self.task.pool(states, batch)

    def _states(self, batch: Batch) -> Float[Tensor, "b *t h"]:
        inputs = self.task.inputs(batch)
        return self.hooked.states(self.encoder, inputs)

    def logits(self, head: Head, batch: Batch) -> Float[Tensor, "_ *t c"]:
        """The running batch's logits, rows in the order of its examples."""
        raise NotImplementedError

    def answer(self, live: LiveAssembly, batch: Batch) -> Float[Tensor, "_ *t c"]:
        """The running batch's logits of a live assembly: of its head; or, of terms that run apart,
        the logarithm of their mean probabilities.
        """
        if not live.assembly.mix.apart:
            return self.logits(live.head, batch)
        return self._apart(live, batch)

    def _apart(self, live: LiveAssembly, batch: Batch) -> Float[Tensor, "b *t c"]:
        """Each term that some example chose runs alone, on the examples that chose it."""
        choice = live.choice
        assert isinstance(choice, Choice)  # of a router that chooses by example
        found: Tensor | None = None
        for number, (term, head) in enumerate(zip(live.terms, live.heads, strict=True)):
            rows = choice.who[number]
            if not len(rows):
                continue
            with self.hooked.instead(live.part([term.name])):
                logits = self.logits(head, {key: value[rows] for key, value in batch.items()})
            own = logits.softmax(-1) * choice.per(rows, number, logits)
            if found is None:
                found = own.new_zeros(len(choice.weights), *own.shape[1:])
            found.index_add_(0, rows, own)
        assert found is not None  # every example chose a term
        return found.log()

    def losses(
        self,
        heads: Sequence[Head],
        rows: Sequence[int],
        batch: Batch,
    ) -> list[Float[Tensor, ""]]:
        """The task's loss on each client's ``rows`` of the running batch, read with its own head."""
        (head,) = heads
        logits = self.logits(head, batch)
        return [self.task.loss(logits, batch)]

    def evaluate(
        self,
        live: LiveAssembly,
        examples: Sequence[Example],
        passes: Passes,
        found: Found | None = None,
    ) -> dict[str, float]:
        """Sums for ``Task.measure``; ``found`` takes what was answered."""
        sums: dict[str, float] = {}
        if found is None and self.task.windows:
            found = {}
        for indices, batch in passes(live, examples):
            with span("forward"):
                logits = self.answer(live, batch)
                scores = self.task.score(logits, batch)
            if found is not None:
                answers = self.task.by_example(logits, batch)
                found.update(zip(indices, answers.cpu(), strict=True))
            for key, value in scores.items():
                sums[key] = sums.get(key, 0.0) + value
        if found is not None and self.task.windows:
            sums |= self.task.judged(logits_in(found), examples)
        return sums


class Pooled(Reader[HeadedTask]):
    """An encoder and our head, on pooled states or on the state of each token."""

    @property
    def encoder(self) -> nn.Module:
        encoder: nn.Module = self.base.model
        return encoder

    def logits(self, head: Head, batch: Batch) -> Float[Tensor, "b *t c"]:
        seen = self._seen(batch)
        return self.task.head_logits(seen, head)

    def answer(self, live: LiveAssembly, batch: Batch) -> Float[Tensor, "b *t c"]:
        """As in Reader; where each term has a head, all read the mixed states, and their logits add
        up by the share that an example gave each term.
        """
        heads = live.heads
        if not heads or live.assembly.mix.apart:
            return super().answer(live, batch)
        seen = self._seen(batch)
        assert live.tally is not None  # only terms that are routed to have heads of their own
        logits = torch.stack([self.task.head_logits(seen, head) for head in heads])
        return torch.einsum("bn,nb...->b...", live.tally.shares(), logits)

    def losses(
        self,
        heads: Sequence[Head],
        rows: Sequence[int],
        batch: Batch,
    ) -> list[Float[Tensor, ""]]:
        states = self._seen(batch).split(list(rows))
        parts = parts_of(batch, rows)
        losses = []
        for head, own, part in zip(heads, states, parts, strict=True):
            logits = self.task.head_logits(own, head)
            losses.append(self.task.loss(logits, part))
        return losses

    @property
    def head_sees_features(self) -> bool:
        return self.task.level == "example" and self.task.rows_each == 1

    def _seen(self, batch: Batch) -> Float[Tensor, "b *t h"]:
        """What the head sees of each example."""
        states = self._states(batch)
        if self.task.level == "token":
            return states
        return self.task.pool(states, batch)


class Stock(Reader[Task]):
    """The checkpoint's own model with its own head, whose tensors are a client's.

    It may find its token by place in a padded batch, so it runs no packed rows; and the head is
    inside the model, so clients do not share a pass.
    """

    joins = False
    packs = False

    def logits(self, head: Head, batch: Batch) -> Float[Tensor, "b *t c"]:
        inputs = self.task.inputs(batch)
        found = torch.func.functional_call(self.base.model, dict(head), kwargs=inputs)
        return self.task.read(found)


class Writer(Reader[WritingTask]):
    """A language model and its own output layer."""

    has_head = False

    def __init__(self, hooked: HookedBase, task: WritingTask):
        super().__init__(hooked, task)
        self.language = self._language(hooked.base)

    def _language(self, base: Base) -> LanguageModel:
        """The model's own passes."""
        return LanguageModel(base)

    @staticmethod
    def token_bytes(base: Base) -> int:
        """Logits, their softmax and its gradient, in float32."""
        return 3 * 4 * int(base.model.config.vocab_size)

    def close(self) -> None:
        self.language.close()

    def logits(self, head: Head, batch: Batch) -> Float[Tensor, "n c"]:
        """At the positions where the task asks for a token, row by row."""
        asked = self.task.positions(batch)
        inputs = self.task.inputs(batch)
        return self.language.logits(self.hooked.inputs(inputs), self.hooked.places(asked))

    def losses(
        self,
        heads: Sequence[Head],
        rows: Sequence[int],
        batch: Batch,
    ) -> list[Float[Tensor, ""]]:
        parts = parts_of(batch, rows)
        counts = []
        for part in parts:
            asked = self.task.positions(part)
            counts.append(int(asked.sum()))
        logits = self.logits({}, batch).split(counts)
        pairs = zip(logits, parts, strict=True)
        return [self.task.loss(own, part) for own, part in pairs]

    def evaluate(
        self,
        live: LiveAssembly,
        examples: Sequence[Example],
        passes: Passes,
        found: Found | None = None,
    ) -> dict[str, float]:
        """Sums over tokens, and over texts that it writes for some of the examples."""
        sums = super().evaluate(live, examples, passes)
        indices = self.task.chosen(examples)
        chosen = [examples[index] for index in indices]
        texts = self.write(live, chosen, passes)
        if found is not None:
            found.update(zip(indices, texts, strict=True))
        of_texts = self.task.judge(texts, chosen)
        return sums | of_texts

    def write(
        self,
        live: LiveAssembly,
        examples: Sequence[Example],
        passes: Passes,
        most: int | None = None,
    ) -> list[str]:
        """What it writes after each prompt, greedily, in the given order; ``most`` new tokens."""
        tokenizer = self.base.processor
        ends = self.task.ends(tokenizer)
        most = most or self.task.max_new_tokens
        # a layer that is left out keeps no cache, and the first one's length is what positions come
        # from
        cache = live.assembly.layers is None
        texts: dict[int, str] = {}
        for indices, batch in passes(live, examples, self.task.prompts):
            written = self.language.generate(
                batch,
                most=most,
                ends=ends,
                cache=cache,
            )
            decoded = tokenizer.batch_decode(written, skip_special_tokens=True)
            for index, text in zip(indices, decoded, strict=True):
                texts[index] = text.strip()
        return [texts[index] for index in range(len(examples))]


class FromEncoder(Writer):
    """An encoder-decoder and its own output layer: prompts are read by the encoder, and the decoder is
    asked for what comes after the tokens of the completion.

    The two have rows of different length, so it runs no packed rows.
    """

    packs = False
    language: EncoderDecoder

    def _language(self, base: Base) -> EncoderDecoder:
        return EncoderDecoder(base)

    @property
    def encoder(self) -> nn.Module:
        encoder: nn.Module = self.base.model.get_encoder()
        return encoder

    def logits(self, head: Head, batch: Batch) -> Float[Tensor, "n c"]:
        """As in Writer."""
        asked = self.task.positions(batch)
        inputs: dict[str, object] = {**self.task.inputs(batch)}
        inputs["decoder_input_ids"] = self.language.before(batch.get("labels"), asked)
        return self.language.logits(inputs, asked)


#: ``Base.head`` -> its reader
READERS: dict[str, type[Reader]] = {
    "pooled": Pooled,
    "stock": Stock,
    "lm": Writer,
    "seq2seq": FromEncoder,
}


def reader_of(hooked: HookedBase, task: Task) -> Reader:
    """The reader of a base for a task. Raises ``JobError`` where the task cannot be read so."""
    head = hooked.base.head
    if head not in task.heads:
        wanted = " or ".join(map(repr, task.heads))
        raise JobError(
            f"data.task = {task.name!r} reads a model by {wanted}, but {hooked.base.name} was "
            f"loaded for {head!r}; choose another task or model.head."
        )
    return READERS[head](hooked, task)


def parts_of(batch: Batch, rows: Sequence[int]) -> list[Batch]:
    """The batch in parts of so many examples, every tensor of it."""
    parts: list[Batch] = [{} for _ in rows]
    for name, values in batch.items():
        pieces = values.split(list(rows))
        for part, piece in zip(parts, pieces, strict=True):
            part[name] = piece
    return parts
