"""A Hugging Face ``Trainer`` as a client: their loop trains, everything else of the client is ours.

A client's round is ``training.client.ClientHalf``: the method says what to run and what leaves. It
asks a kernel to train. Here that is a ``TrainerKernel``: it puts the terms of the step on the
Trainer's own model as hooks with parameters, lets the Trainer make the step's optimiser steps, and
takes terms and hooks off again. So every method's plan and report work unchanged, and measuring and
leaving are the kernel's, on the same frozen weights (they are in memory once).

The Trainer's are: rows and their order, collator, loss, optimiser and learning rate, precision,
dropout, callbacks. The job's are: how many steps, of how many rows, what trains and from where, and
the schedule, which runs over all rounds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from fedgrove.adapters.assembly import Assembly, Term, trained_parameters
from fedgrove.federation.tasks.base import Example
from fedgrove.ground.errors import JobError, RunError
from fedgrove.ground.plain import Plain
from fedgrove.ground.seeds import derive
from fedgrove.methods.contract import Step, Trained
from fedgrove.training.client import ClientHalf
from fedgrove.training.kernel import Kernel, Work
from fedgrove.training.lanes import Lanes
from fedgrove.training.live import LiveAssembly
from fedgrove.training.loop import Stretch, factor

if TYPE_CHECKING:
    from fedgrove.federation.tasks.base import Batch
    from fedgrove.job import Job
    from fedgrove.runs.directory import RunDirectory
    from fedgrove.runs.engine import Engine
    from fedgrove.runs.parts import Parts
    from fedgrove.runs.stage import Stage
    from fedgrove.start import Opener
    from fedgrove.tracking.callback import Callback

_PARAMETER = "fedgrove_{}"  # what trains beside the head, as the Trainer's model names it


@dataclass(frozen=True, eq=False)
class Participant:
    """Whose Trainer is wanted: a client, its job, and its rows as the job's task reads them."""

    name: str
    parts: Parts
    rows: Sequence[Example]

    @property
    def job(self) -> Job:
        return self.parts.job

    @property
    def settings(self) -> Plain:
        """``[train]`` of the job as keys of ``TrainingArguments``, to be changed where a script
        wants another optimiser or rate.
        """
        train = self.job.train
        found: Plain = {
            "per_device_train_batch_size": train.batch_size,
            "gradient_accumulation_steps": train.accumulation,
            "learning_rate": train.lr,
            "weight_decay": train.weight_decay,
            "max_grad_norm": train.clip,
            "use_cpu": train.device == "cpu",
        }
        if train.optimizer == "sgd":
            found["optim"] = "sgd"
        return found

    def collate(self, examples: Sequence[Example]) -> Batch:
        """Rows as a batch of the model's inputs and ``labels``, for a script without a collator of
        its own.
        """
        task = self.parts.task
        batch = task.collate(examples, self.parts.base.pad_id)
        return {**task.inputs(batch), "labels": batch["labels"]}


#: A script's part: a client's ``transformers.Trainer``, asked for once.
MakeTrainer = Callable[[Participant], Any]


class TrainerKernel(Kernel):
    """A kernel whose training steps a client's own Trainer makes."""

    def __init__(self, parts: Parts, make: MakeTrainer):
        """Raises ``JobError`` where no Trainer can carry the job."""
        refuse(parts)
        super().__init__(parts.base, parts.task, parts.job.train, dropout=parts.job.lora.dropout)
        self.parts = parts
        self.make = make
        self._trainers: dict[str, Any] = {}

    def joins(self, work: Work) -> bool:
        """Never: each client has a model of its own."""
        return False

    def work(self, work: Work) -> Trained:
        """As in Kernel. Raises ``JobError`` for a step that a Trainer cannot carry."""
        step = work.step
        if step.measure != "train" or trained_parameters(step.assembly) == 0:
            return super().work(work)
        refuse_step(step)
        trainer = self._trainer(str(work.clock.keys[-1]), work.examples)
        steps = self.steps(step, len(work.examples))
        live = _as_parameters(self._live(trainer.model, step.assembly))
        stretch = Stretch(steps, work.clock.start, work.clock.end)
        seed = derive(work.clock.seed, *work.clock.keys, step.stream, "trainer")
        with (
            _running(trainer.model, live, self.base.sites),
            _asked(trainer, steps, seed),
        ):
            self._optimiser(trainer, live, stretch)
            told = trainer.train()
        if told.global_step != steps:
            raise RunError(
                f"The Trainer made {told.global_step} of {steps} steps; take out the callback that "
                f"stops it."
            )
        return Trained(live.trained(), float(told.training_loss), steps)

    def _live(self, model: nn.Module, assembly: Assembly) -> LiveAssembly:
        """The assembly on the Trainer's device."""
        return LiveAssembly(
            _unfolded(assembly),
            device=next(model.parameters()).device,
            dtype=self.base.adapter_dtype,
            train=True,
            dropout=self.dropout,
            frozen=self.layers.at,
        )

    def _trainer(self, client: str, rows: Sequence[Example]) -> Any:
        """The client's Trainer, made and checked at the first call."""
        if client not in self._trainers:
            trainer = self.make(Participant(client, self.parts, rows))
            self._check(trainer, client, len(rows))
            share_weights(self.base.model, trainer.model, self.base.head_modules)
            self._trainers[client] = trainer
        return self._trainers[client]

    def _check(self, trainer: Any, client: str, rows: int) -> None:
        """Raises ``JobError`` where the Trainer is not what its job agreed on."""
        arguments, train = trainer.args, self.options
        if trainer.model_init is not None:
            raise JobError(
                "The Trainer makes its model anew for each training (model_init); give it a model."
            )
        if arguments.world_size * max(1, arguments.n_gpu) > 1:
            raise JobError(
                "The Trainer works in several processes or on several GPUs; start the script alone, "
                "with one device visible."
            )
        asked = (train.batch_size, train.accumulation)
        has = (arguments.per_device_train_batch_size, arguments.gradient_accumulation_steps)
        if has != asked:
            raise JobError(
                f"The Trainer of {client} takes {has[1]} batches of {has[0]} rows a step, and the "
                f"job {asked[1]} of {asked[0]}; set per_device_train_batch_size and "
                f"gradient_accumulation_steps to the job's."
            )
        dataset = trainer.train_dataset
        if not hasattr(dataset, "__len__") or len(dataset) != rows:
            count = "an unknown number of"
            if hasattr(dataset, "__len__"):
                count = str(len(dataset))
            raise JobError(
                f"The Trainer of {client} has {count} rows, and the client says {rows}, by which "
                f"its update is weighed; give both the same rows."
            )

    def _optimiser(self, trainer: Any, live: LiveAssembly, stretch: Stretch) -> None:
        """The Trainer's own optimiser over what trains now, under the job's schedule."""
        options = self.options
        trainer.optimizer = None
        optimizer = trainer.create_optimizer()
        rates: dict[Tensor, float] = {}
        for multiplier, leaves in live.groups.items():
            if multiplier is not None:
                rates |= dict.fromkeys(leaves, multiplier)
        if options.head_lr is not None:
            share = options.head_lr / trainer.args.learning_rate
            for name in live.head:
                rates[trainer.model.get_parameter(name)] = share
        _rate(optimizer, rates)

        def now(index: int) -> float:
            progress = stretch.progress(index)
            return factor(progress, options.schedule, options.warmup_fraction)

        trainer.lr_scheduler = LambdaLR(optimizer, now)
        trainer._created_lr_scheduler = False


# ------------------------------------------------------------------------------ what is refused
def refuse(parts: Parts) -> None:
    """Raise ``JobError`` where no Trainer can carry the job."""
    if find_spec("accelerate") is None:
        raise JobError(
            "A Trainer as a client needs the package accelerate; install it with: pip install "
            "'fedgrove[trainer]'."
        )
    if parts.task.rows_each > 1:
        raise JobError(
            f'data.task = "{parts.task.name}" compares two answers, which a Trainer\'s own loss does '
            "not; train without a Trainer, or with TRL's own trainers on one machine."
        )
    if parts.base.head == "pooled":
        raise JobError(
            "model.head = \"pooled\" is a head of Fedgrove's own, which a Trainer's model lacks; "
            'set it to "stock".'
        )
    if parts.job.privacy.example_level:
        raise JobError(
            "privacy.example_clip clips each example's gradient, which a Trainer does not show; "
            "leave it out, or train without a Trainer."
        )


def refuse_step(step: Step) -> None:
    """Raise ``JobError`` where a Trainer cannot make a step of local work."""
    mix = step.assembly.mix
    what = ""
    if step.penalty is not None:
        what = "adds a penalty to the loss"
    elif not mix.linear or mix.needs_features or mix.routes or mix.apart:
        what = f"mixes its terms by the input ({type(mix).__name__})"
    elif step.assembly.layers is not None:
        what = "leaves out layers of the model"
    elif step.part != (0.0, 1.0) or step.count:
        what = "trains on a part of the rows"
    if what:
        raise JobError(
            f"A step of the job's method {what}, which a Trainer cannot carry; choose another "
            f"method or option, or train without a Trainer."
        )


def refuse_method(half: ClientHalf, stage: Stage[Engine]) -> None:
    """Raise ``JobError`` where a first round would: asked before anything is written."""
    method = half.method
    state = method.open(method.begin(list(stage.clients.values())), 1)
    for info in stage.clients.values():
        content = method.offer(state, 1, info)
        given = half.given({"method": content}, {})
        for step in method.plan(info, given.offer, given.mine, 1):
            if step.measure != "train":  # the steps after it wait for what it finds
                break
            refuse_step(step)


# ------------------------------------------------------------------------ on the Trainer's model
def share_weights(ours: nn.Module, theirs: nn.Module, heads: Sequence[str]) -> None:
    """Let the Trainer's model have our frozen weights, which must be its own already. ``heads``: the
    modules of the head, which are the client's. Raises ``JobError`` where they differ.
    """
    if hasattr(theirs, "peft_config"):
        raise JobError(
            "The Trainer's model has adapters of PEFT already; give it the plain model: the job says "
            "what is adapted."
        )
    known = dict(theirs.named_parameters())
    for name, own in ours.named_parameters():
        if name.startswith(tuple(f"{head}." for head in heads)):
            continue
        other = known.get(name)
        if other is None or other.shape != own.shape or other.dtype != own.dtype:
            raise JobError(
                f"The Trainer's model is not the job's: '{name}' is missing, or of another shape or "
                f"precision; load model.name of the job in its train.dtype ({own.dtype})."
            )
        if not torch.equal(other.detach().to(own.device), own.detach()):
            raise JobError(
                f"The Trainer's model is not the job's: '{name}' has other numbers; load the "
                f"checkpoint that model.name of the job names."
            )
        if other.device == own.device:
            other.data = own.data


@contextmanager
def _running(model: nn.Module, live: LiveAssembly, sites: Mapping[str, Any]) -> Iterator[None]:
    """Inside, the assembly runs on the model and alone trains, its head in the model's own place;
    afterwards the model is as it was, but for the head, and the assembly has what was trained.
    """
    required = {each: each.requires_grad for each in model.parameters()}
    handles = []
    try:
        model.requires_grad_(False)
        for name, extra in live.assembly.extras.items():
            if name.startswith("head."):
                _into_head(model, name.removeprefix("head."), live.extras[name], extra.train)
        for number, leaf in enumerate(_outside_the_head(live)):
            model.register_parameter(_PARAMETER.format(number), leaf)
        modules = dict(model.named_modules())
        for name, site in sites.items():
            handles.append(modules[name].register_forward_hook(partial(_add, live, site)))
        yield
        for name, value in live.head.items():
            with torch.no_grad():
                value.copy_(model.get_parameter(name))
    finally:
        for handle in handles:
            handle.remove()
        for name in [each for each in model._parameters if each.startswith(_PARAMETER[:-2])]:
            del model._parameters[name]
        for parameter, wanted in required.items():
            parameter.requires_grad_(wanted)
            parameter.grad = None


def _add(
    live: LiveAssembly,
    site: Any,
    module: nn.Module,
    args: tuple[Tensor, ...],
    output: Float[Tensor, " *rows out"],
) -> Float[Tensor, " *rows out"]:
    """The hook on a site, whose input is ``args[0]`` [..., in]."""
    return live.add(site, args[0], output)


def _into_head(model: nn.Module, name: str, value: Tensor, train: bool) -> None:
    """Give the model's own head the value [as the parameter]. Raises ``JobError`` where it has
    another.
    """
    try:
        parameter = model.get_parameter(name)
    except AttributeError:
        parameter = None
    if parameter is None or parameter.shape != value.shape or parameter.dtype != value.dtype:
        raise JobError(
            f"The Trainer's model lacks '{name}' of the shape {tuple(value.shape)} in {value.dtype}; "
            f"load it with the job's number of classes, its head in full precision."
        )
    with torch.no_grad():
        parameter.copy_(value)
    parameter.requires_grad_(train)


def _outside_the_head(live: LiveAssembly) -> list[nn.Parameter]:
    """What trains beside the head, which has its place in the model."""
    head = {id(value) for value in live.head.values()}
    return [leaf for leaf in live.leaves if id(leaf) not in head]  # type: ignore[misc]


def _as_parameters(live: LiveAssembly) -> LiveAssembly:
    """The same numbers, its leaves parameters."""
    return live.copy(nn.Parameter)


def _unfolded(assembly: Assembly) -> Assembly:
    """What would be written into the weights as a frozen term, which computes the same."""
    if not assembly.folded:
        return assembly
    folded = Term("folded", assembly.folded, train="")
    return replace(assembly, terms=(*assembly.terms, folded), folded=None)


# ------------------------------------------------------------------------------- on the Trainer
@contextmanager
def _asked(trainer: Any, steps: int, seed: int) -> Iterator[None]:
    """Inside, ``train()`` makes so many steps and writes no checkpoint; its draws (order of the
    rows, dropout) are those of the seed. Nothing outside notices the draws.
    """
    arguments = trainer.args
    before = arguments.max_steps, arguments.save_strategy, arguments.load_best_model_at_end
    order = trainer.accelerator.dataloader_config
    data_seed = order.data_seed
    devices = []
    if arguments.device.type == "cuda":
        devices = [arguments.device]
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        arguments.max_steps = steps
        arguments.save_strategy = type(arguments.save_strategy)("no")
        arguments.load_best_model_at_end = False
        order.data_seed = seed % 2**31
        try:
            yield
        finally:
            arguments.max_steps, arguments.save_strategy, arguments.load_best_model_at_end = before
            order.data_seed = data_seed
            trainer.optimizer = trainer.lr_scheduler = None
            trainer.accelerator.free_memory()


def _rate(optimizer: torch.optim.Optimizer, rates: Mapping[Tensor, float]) -> None:
    """Multiply the learning rate of the parameters ``[any shape]`` that are named by their rates."""
    for group in list(optimizer.param_groups):
        apart: dict[float, list[Tensor]] = {}
        for parameter in group["params"]:
            apart.setdefault(rates.get(parameter, 1.0), []).append(parameter)
        group["params"] = apart.pop(1.0, [])
        for rate, parameters in apart.items():
            own = {**group, "params": parameters, "lr": group["lr"] * rate}
            optimizer.add_param_group(own)


# ------------------------------------------------------------------------------------ taking part
def half_of(parts: Parts, make: MakeTrainer) -> ClientHalf:
    """The client's half of a job whose training is the Trainers'."""
    kernel = TrainerKernel(parts, make)
    return parts.client_half(lanes=Lanes([kernel], int(parts.job.train.threads)))


def simulated(make: MakeTrainer) -> Opener:
    """The local engine with Trainers for clients: ``fg.run(job, engine=simulated(make))``."""
    from fedgrove.engines.local import in_process

    @contextmanager
    def opened(
        job: Job, directory: RunDirectory, *, resume: bool, watch: Callback
    ) -> Iterator[Stage[Engine]]:
        with in_process(job, directory, resume=resume, watch=watch) as stage:
            half = half_of(stage.parts, make)
            half.watch = stage.engine.half.watch
            refuse_method(half, stage)
            stage.engine.half = half
            yield stage

    return opened


def attend(folder: str | Path, make: MakeTrainer, *, say: Callable[[str], None] = print) -> None:
    """What ``fedgrove deploy site FOLDER`` does, with the site's own Trainer, until Ctrl-C.

    Raises ``FedgroveError`` for what is wrong before anything is started.
    """
    from fedgrove.deploy import attend as site
    from fedgrove.deploy.app import site_client

    site.attend(Path(folder), say=say, app=site_client(lambda parts: half_of(parts, make)))
