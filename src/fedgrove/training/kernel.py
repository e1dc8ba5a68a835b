"""The one training kernel: an assembly on the resident frozen base, one client at a time.

The base is never copied and never changes. Forward hooks on its sites add what the live assembly
computes; autograd stops below the lowest adapted site because nothing there has a gradient.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from fedgrove.adapters.adapter import Factors, Site
from fedgrove.adapters.assembly import Assembly, trained_parameters
from fedgrove.adapters.private import unseal
from fedgrove.federation.tasks.base import Batch, Example, Task
from fedgrove.federation.tasks.generate import Generate, Template
from fedgrove.ground.errors import JobError
from fedgrove.ground.seeds import derive, generator
from fedgrove.interop.models import Base
from fedgrove.interop.quantise import foldable
from fedgrove.methods.contract import Step, Trained
from fedgrove.privacy.example_dp import ExampleGuard
from fedgrove.training import packed
from fedgrove.training.language import LanguageModel, padded_left
from fedgrove.training.live import LiveAssembly
from fedgrove.training.private_steps import private_steps
from fedgrove.training.profile import span

if TYPE_CHECKING:
    from fedgrove.training.cohort import Cohort

_SHORT = 256  # tokens; beyond that the attention matrices of plain attention cost too much memory


@dataclass(frozen=True)
class TrainOptions:
    """How local training runs; the fields are the job's ``[train]`` keys."""

    optimizer: str = "adamw"
    lr: float = 1e-3
    head_lr: float | None = None
    weight_decay: float = 0.0
    momentum: float = 0.0
    schedule: str = "constant"
    warmup_fraction: float = 0.0
    clip: float = 0.0
    batch_size: int = 8
    accumulation: int = 1
    local_steps: int | None = 8
    local_epochs: float | None = None
    eval_batch_size: int = 64
    dropout: float = 0.0


@dataclass(frozen=True)
class Clock:
    """Where in the whole run a step of local work stands, for the learning-rate schedule."""

    seed: int
    keys: tuple[object, ...]  # (round, client)
    start: float = 0.0  # share of the run that is done before the round
    end: float = 1.0


class Halted(Exception):
    """Work was given up between two batches."""


class Kernel:
    """Trains and evaluates assemblies on one base. Not reentrant: one client at a time."""

    def __init__(self, base: Base, task: Task, options: TrainOptions):
        self.base, self.task, self.options = base, task, options
        self._live: LiveAssembly | Cohort | None = None
        self._layout: packed.Layout | None = None
        self.halted = False  # set from another thread: work ends before its next batch
        # a stock head finds its token by place in a padded batch
        self._packs = base.head != "stock" and packed.packs(base.model)
        modules = dict(base.model.named_modules())
        self._hooks = [
            modules[name].register_forward_hook(partial(self._add, site))
            for name, site in base.sites.items()
        ]
        self._layers = transformer_layers(base)
        for layer, module in self._layers.items():
            module.forward = partial(self._layer, layer, module.forward)
        self.language = LanguageModel(base) if base.head == "lm" else None

    def close(self) -> None:
        """Take the hooks off the base."""
        for hook in self._hooks:
            hook.remove()
        for module in self._layers.values():
            module.__dict__.pop("forward", None)
        if self.language is not None:
            self.language.close()

    # ---------------------------------------------------------------- training
    def train(
        self,
        step: Step,
        examples: Sequence[Example],
        clock: Clock,
        guard: ExampleGuard | None = None,
    ) -> Trained:
        """Run one step on one client's examples and give back the trained assembly.

        With a ``guard`` each example's gradient is clipped and noise added (``[privacy]
        example_clip``).
        """
        if guard is not None and step.measure != "train":
            raise JobError(
                f'A step that measures "{step.measure}" reads examples without noise, so '
                f"privacy.example_clip cannot "
                "hold; leave it out with this method."
            )
        if step.measure == "features":
            chosen = some(examples, step, clock)
            return Trained(step.assembly, math.nan, 0, features=self.features(chosen))
        if step.measure == "train" and step.count:
            examples = some(examples, step, clock)
        if trained_parameters(step.assembly) == 0:
            return Trained(step.assembly, math.nan, 0)
        torch.manual_seed(derive(clock.seed, *clock.keys, step.stream, "dropout"))
        order = generator(clock.seed, *clock.keys, step.stream, "order")
        with self._opened(step.assembly, train=True) as live:
            if step.measure == "fisher":
                return self._fisher(step, live, examples, order)
            if guard is not None:
                return private_steps(self, step, live, examples, clock, guard)
            return self._optimise(step, live, examples, order, clock)

    def _optimise(
        self,
        step: Step,
        live: LiveAssembly,
        examples: Sequence[Example],
        order: torch.Generator,
        clock: Clock,
    ) -> Trained:
        count = self.steps(step, len(examples))
        optimizer = self._optimizer(live)
        rates = [group["lr"] for group in optimizer.param_groups]
        batches = batch_order(len(examples), self.options.batch_size, order)
        total = 0.0
        for index in range(count):
            progress = clock.start + (clock.end - clock.start) * index / count
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * self._factor(progress)
            optimizer.zero_grad(set_to_none=True)
            for _ in range(self.options.accumulation):
                with span("batches"):
                    batch = self._batch([examples[i] for i in next(batches)])
                with self._running(batch, live):
                    with span("forward"):
                        objective, loss = self._losses(live, step, batch)
                    with span("backward"):
                        (objective / self.options.accumulation).backward()
                total += loss.item() / self.options.accumulation
            with span("optimiser"):
                if self.options.clip > 0:
                    nn.utils.clip_grad_norm_(live.leaves, self.options.clip)
                optimizer.step()
        return Trained(live.trained(), total / count, count)

    def steps(self, step: Step, examples: int) -> int:
        """How many optimiser steps a step of local work makes on so many examples."""
        per_epoch = math.ceil(examples / self.options.batch_size) / self.options.accumulation
        if step.epochs is not None:
            return max(1, math.ceil(step.epochs * per_epoch))
        if self.options.local_epochs is not None:
            return max(1, math.ceil(self.options.local_epochs * per_epoch * step.share))
        return max(1, round((self.options.local_steps or 1) * step.share))

    # -------------------------------------------------------------- evaluation
    @torch.inference_mode()
    def evaluate(
        self,
        assembly: Assembly,
        examples: Sequence[Example],
        keep: list[dict[str, Any]] | None = None,
    ) -> dict[str, float]:
        """The task's measures of an assembly on some examples.

        Of a language model some are those of texts that it writes here; ``keep`` takes them, one
        object for each.
        """
        sums: dict[str, float] = {}
        with self._opened(assembly, train=False) as live:
            for indices in self._by_length(examples):
                with span("batches"):
                    batch = self._batch([examples[i] for i in indices])
                with self._running(batch, live), span("forward"):
                    scores = self.task.score(self._logits(live, batch), batch)
                for key, value in scores.items():
                    sums[key] = sums.get(key, 0.0) + value
        if self.language is not None:
            chosen = [examples[index] for index in cast(Generate, self.task).chosen(examples)]
            outputs = self.generate(assembly, chosen)
            sums |= cast(Generate, self.task).judge(outputs, chosen)
            if keep is not None:
                keep += [
                    {
                        "prompt": example["prompt"],
                        "reference": example["references"][0],
                        "output": output,
                    }
                    for example, output in zip(chosen, outputs, strict=True)
                ]
        return self.task.measure(sums)

    @torch.inference_mode()
    def generate(
        self, assembly: Assembly, examples: Sequence[Example], most: int | None = None
    ) -> list[str]:
        """What a language model writes after each prompt, greedily, in the given order; ``most``
        new tokens.
        """
        assert self.language is not None
        task, tokenizer = cast(Generate, self.task), self.base.processor
        ends = Template(tokenizer).ends()
        texts: dict[int, str] = {}
        with self._opened(assembly, train=False) as live:
            for indices in self._by_length(examples):
                batch = padded_left([examples[i]["prompt_ids"] for i in indices], self.base.pad_id)
                batch = {key: value.to(self.base.device) for key, value in batch.items()}
                self._enter(live, batch)
                # a layer that is left out keeps no cache, and the first one's length is what
                # positions come from
                written = self.language.generate(
                    batch,
                    most=most or task.max_new_tokens,
                    ends=ends,
                    cache=assembly.layers is None,
                )
                decoded = tokenizer.batch_decode(written, skip_special_tokens=True)
                texts.update(zip(indices, map(str.strip, decoded), strict=True))
        return [texts[index] for index in range(len(examples))]

    @torch.inference_mode()
    def logits(self, assembly: Assembly, examples: Sequence[Example]) -> Tensor:
        """Logits ``[examples, classes]`` in the given order, on the CPU."""
        rows: dict[int, Tensor] = {}
        with self._opened(assembly, train=False) as live:
            for indices in self._by_length(examples):
                batch = self._batch([examples[i] for i in indices])
                with self._running(batch, live):
                    logits = self._logits(live, batch)
                rows.update(zip(indices, logits.cpu(), strict=True))
        return torch.stack([rows[index] for index in range(len(examples))])

    @torch.inference_mode()
    def features(self, examples: Sequence[Example]) -> Tensor:
        """Pooled features ``[examples, hidden]`` of the untouched base, in the given order, on the
        CPU.
        """
        rows: dict[int, Tensor] = {}
        for indices in self._by_length(examples):
            batch = self._batch([examples[i] for i in indices])
            with self._running(batch):
                pooled = self._features(batch)
            rows.update(zip(indices, pooled.cpu(), strict=True))
        return torch.stack([rows[index] for index in range(len(examples))])

    # ------------------------------------------------------------------ pieces
    @contextmanager
    def _opened(self, assembly: Assembly, *, train: bool) -> Iterator[LiveAssembly]:
        """The assembly live on the base; afterwards the base is as it was, whatever happened."""
        dropout = self.options.dropout if train else 0.0
        live = LiveAssembly(
            assembly,
            device=self.base.device,
            dtype=self.base.adapter_dtype,
            train=train,
            dropout=dropout,
        )
        kept: dict[str, Tensor] = {}
        try:
            for name, factors in (assembly.folded or {}).items():
                linear = self.base.model.get_submodule(name)
                foldable(name, linear)
                kept[name] = linear.weight.data
                update = factors.map(
                    lambda value: unseal(value).to(self.base.device, self.base.adapter_dtype)
                ).product()
                linear.weight.data = (linear.weight.data.to(update.dtype) + update).to(
                    linear.weight.dtype
                )
            yield live
        finally:
            self._live = None
            for name, weight in kept.items():
                self.base.model.get_submodule(name).weight.data = weight

    def _add(
        self, site: Site, module: nn.Module, args: tuple[Any, ...], output: Tensor
    ) -> Tensor | None:
        return None if self._live is None else self._live.add(site, args[0], output)

    def _layer(self, layer: int, forward: Any, *args: Any, **kwargs: Any) -> Any:
        """A transformer layer that the live assembly may leave out: its input passes through."""
        wanted = None if self._live is None else self._live.assembly.layers
        if wanted is None or layer in wanted:
            return forward(*args, **kwargs)
        return args[0] if args else kwargs["hidden_states"]

    def _batch(self, examples: Sequence[Example]) -> Batch:
        """The examples as one batch on the device."""
        if self.halted:
            raise Halted
        batch = self.task.collate(examples, self.base.pad_id)
        return {key: value.to(self.base.device) for key, value in batch.items()}

    def _features(self, batch: Batch) -> Tensor:
        """Pooled states [b, hidden] of a batch, with what the hooks add."""
        model = self.base.model if self.base.head == "pooled" else self.base.model.base_model
        hidden = model(**self._inputs(batch)).last_hidden_state
        if self._layout is not None:
            hidden = self._layout.unpack(hidden)
        return self.task.pool(hidden.to(self.base.adapter_dtype), batch)

    def _enter(self, live: LiveAssembly, batch: Batch) -> None:
        """From here on the hooks add the live assembly, which knows the batch's features where its
        mix needs them.
        """
        if live.assembly.mix.needs_features:
            self._live = None
            with torch.no_grad():
                live.features = self._features(batch)
        self._live = live

    def _logits(self, live: LiveAssembly, batch: Batch) -> Tensor:
        self._enter(live, batch)
        if self.language is not None:
            return self.asked_logits(batch)
        if self.base.head == "pooled":
            return self.task.head_logits(self._features(batch), live.head)
        return torch.func.functional_call(
            self.base.model, live.head, kwargs=self.task.inputs(batch)
        ).logits

    def asked_logits(self, batch: Batch) -> Tensor:
        """A language model's logits [n, vocabulary] where the task asks for them, row by row."""
        assert self.language is not None
        positions = cast(Generate, self.task).positions(batch)
        if self._layout is not None:
            positions = self._layout.pack(positions)
        return self.language.logits(self._inputs(batch), positions)

    @contextmanager
    def together(
        self, cohort: Cohort, lives: Sequence[LiveAssembly], rows: Sequence[int], batch: Batch
    ) -> Iterator[None]:
        """Inside, the base runs a batch of several clients' examples, ``rows`` of each."""
        try:
            with self._running(batch):
                if self._layout is None:
                    cohort.enter(lives, rows, packed=False)
                else:
                    lengths = iter(self._layout.lengths)
                    sizes = [sum(islice(lengths, count)) for count in rows]
                    cohort.enter(lives, [*sizes[:-1], sizes[-1] + self._layout.spare], packed=True)
                self._live = cohort
                yield
        finally:
            self._live = None

    def _losses(self, live: LiveAssembly, step: Step, batch: Batch) -> tuple[Tensor, Tensor]:
        """What is minimised, and the task's part of it: the one that is comparable between methods
        and rounds.
        """
        loss = self.task.loss(self._logits(live, batch), batch)
        if step.penalty is None:
            return loss, loss
        return loss + step.penalty(live.seen()), loss

    def _inputs(self, batch: Batch) -> dict[str, Tensor]:
        if self._layout is None:
            return self.task.inputs(batch)
        return self._layout.inputs(batch, packed.position_shift(self.base.model.config))

    @contextmanager
    def _running(self, batch: Batch, live: LiveAssembly | None = None) -> Iterator[None]:
        """How the base runs a batch, forward and backward: without its padding where that can
        be.
        """
        layout = None
        # weights that depend on the input may be those of an example, which a packed row does not
        # show
        if self._packs and (live is None or live.assembly.mix.linear):
            layout = packed.Layout.of(batch["attention_mask"])
        if layout is None:
            with self._training_attention(batch):
                yield
            return
        self._layout = layout
        try:
            with packed.running(self.base.model.config, layout):
                yield
        finally:
            self._layout = None

    @contextmanager
    def _training_attention(self, batch: Batch) -> Iterator[None]:
        """Plain attention for training in bfloat16 on a CPU, where the fused one's backward pass is
        five times slower.

        Evaluation keeps the model's own choice, so that logits are those that a user gets with
        default settings.
        """
        config = self.base.model.config
        tokens = (
            batch["input_ids"].shape[1] if "input_ids" in batch else 0
        )  # images: a few hundred at most
        chosen = config._attn_implementation
        if (
            self.base.device.type == "cpu"
            and self.base.dtype == torch.bfloat16
            and tokens <= _SHORT
            and chosen == "sdpa"
            and torch.is_grad_enabled()
        ):
            config._attn_implementation = "eager"
        try:
            yield
        finally:
            config._attn_implementation = chosen

    def _optimizer(self, live: LiveAssembly) -> torch.optim.Optimizer:
        return self.optimizer(list(live.groups.items()))

    def optimizer(
        self, leaves: Sequence[tuple[float | None, list[Tensor]]]
    ) -> torch.optim.Optimizer:
        """A fresh optimiser over (learning-rate multiplier, tensors); the multiplier None is the
        head's own rate.
        """
        options = self.options
        head_rate = options.lr if options.head_lr is None else options.head_lr
        groups = [
            {"params": group, "lr": head_rate if rate is None else options.lr * rate}
            for rate, group in leaves
        ]
        if options.optimizer == "sgd":
            return torch.optim.SGD(
                groups, lr=options.lr, momentum=options.momentum, weight_decay=options.weight_decay
            )
        fused = self.base.device.type in ("cpu", "cuda")
        return torch.optim.AdamW(
            groups, lr=options.lr, weight_decay=options.weight_decay, fused=fused
        )

    def _factor(self, progress: float) -> float:
        """The schedule's factor at a share of the whole run: warm-up, then constant, linear or
        cosine to zero.
        """
        warmup = self.options.warmup_fraction
        if progress < warmup:
            return max(progress, 1e-3) / warmup
        rest = (progress - warmup) / max(1e-12, 1 - warmup)
        if self.options.schedule == "linear":
            return max(0.0, 1 - rest)
        if self.options.schedule == "cosine":
            return 0.5 * (1 + math.cos(math.pi * min(1.0, rest)))
        return 1.0

    def _by_length(self, examples: Sequence[Example]) -> Iterator[list[int]]:
        """Indices in batches of similar length, so that little is padding."""
        order = sorted(
            range(len(examples)), key=lambda index: (self.task.length(examples[index]), index)
        )
        size = self.options.eval_batch_size
        for start in range(0, len(order), size):
            yield order[start : start + size]

    def _fisher(
        self, step: Step, live: LiveAssembly, examples: Sequence[Example], order: torch.Generator
    ) -> Trained:
        """Mean squared gradient of each trained factor over batches; nothing is updated."""
        batches = batch_order(len(examples), self.options.batch_size, order)
        count = step.count or math.ceil(len(examples) / self.options.batch_size)
        squares = [torch.zeros_like(leaf) for leaf in live.leaves]
        total = 0.0
        for _ in range(count):
            batch = self._batch([examples[i] for i in next(batches)])
            with self._running(batch, live):
                objective, loss = self._losses(live, step, batch)
                gradients = torch.autograd.grad(objective, live.leaves, allow_unused=True)
            total += loss.item()
            for square, gradient in zip(squares, gradients, strict=True):
                if gradient is not None:
                    square += gradient**2 / count
        by_leaf = {
            id(leaf): square.cpu() for leaf, square in zip(live.leaves, squares, strict=True)
        }

        def score(leaf: Tensor) -> Tensor:
            return by_leaf.get(id(leaf), torch.zeros(leaf.shape))

        scores = {
            term.term.name: {
                name: Factors(score(f.A), score(f.B), f.scale) for name, f in term.adapter.items()
            }
            for term in live.terms
        }
        return Trained(step.assembly, total / count, 0, scores=scores)


def transformer_layers(base: Base) -> dict[int, nn.Module]:
    """The module of each numbered layer that holds a site, by layer index."""
    found: dict[int, nn.Module] = {}
    for name, site in base.sites.items():
        parts = name.split(".")
        numbers = [index for index, part in enumerate(parts) if part.isdigit()]
        if numbers and int(parts[numbers[0]]) == site.layer:
            found[site.layer] = base.model.get_submodule(".".join(parts[: numbers[0] + 1]))
    return found


def batch_order(examples: int, size: int, rng: torch.Generator) -> Iterator[list[int]]:
    """Batches of indices without end: a new permutation for each pass, the last batch of a pass may
    be short.
    """
    while True:
        order = torch.randperm(examples, generator=rng).tolist()
        for start in range(0, examples, size):
            yield order[start : start + size]


def some(examples: Sequence[Example], step: Step, clock: Clock) -> Sequence[Example]:
    """The step's ``count`` examples, a seeded draw in the given order (rows may be sorted by
    label); 0: all.
    """
    if not step.count:
        return examples
    rng = generator(clock.seed, *clock.keys, step.stream, "examples")
    return [
        examples[index]
        for index in sorted(torch.randperm(len(examples), generator=rng)[: step.count].tolist())
    ]
