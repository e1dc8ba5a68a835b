"""A Trainer as a client gives what our own kernel gives, and refuses what it cannot carry."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.stops import StopAfter
from tests.test_run import adapters
from tests.tiny import save_silos, tiny_job, without_reports

from fedgrove.adapters.tree import typed
from fedgrove.ground.errors import FedgroveError, JobError
from fedgrove.ground.seeds import generator
from fedgrove.integrations.trainer import (
    Participant,
    half_of,
    simulated,
)
from fedgrove.interop.models import load_base
from fedgrove.methods.contract import ClientInfo
from fedgrove.runs.parts import Parts, head_policy
from fedgrove.runs.prepare import settle
from fedgrove.start import run
from fedgrove.training.client import ClientHalf, Outcome
from fedgrove.training.loop import batch_order

pytest.importorskip("accelerate")
from transformers import (
    AutoModelForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

ROUNDS = 2


class InOrder(Trainer):
    """Takes the batches that our own kernel takes: its order is the job's, by round and client."""

    def __init__(self, who: Participant, *args: Any, **named: Any):
        self.who, self.round, self.streams = who, 0, [("train",)]
        super().__init__(*args, **named)

    def get_train_dataloader(self) -> Any:
        self.round += 1
        seed, size = self.who.job.run.seed, self.args.per_device_train_batch_size
        rng = generator(seed, self.round, self.who.name, "train", "order")
        order = batch_order(len(self.who.rows), size, rng)
        batches = [next(order) for _ in range(self.args.max_steps)]
        return torch.utils.data.DataLoader(
            self.who.rows,  # type: ignore[arg-type]
            batch_sampler=batches,
            collate_fn=self.data_collator,
        )


def trainer_of(
    out: Path,
    who: Participant,
    kind: Any = Trainer,
    dtype: torch.dtype = torch.float32,
    **more: Any,
) -> Trainer:
    """What a script makes."""
    model = AutoModelForSequenceClassification.from_pretrained(
        who.job.model.name, num_labels=2, dtype=dtype, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    settings = {**who.settings, "report_to": "none", "disable_tqdm": True, **more}
    arguments = TrainingArguments(str(out), **settings)
    if kind is not Trainer:
        kind = partial(kind, who)
    return kind(model, arguments, train_dataset=who.rows, data_collator=who.collate)


@pytest.fixture(scope="module")
def silos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_silos(tmp_path_factory.mktemp("data") / "silos", clients=2, rows=16)


def stock_job(bert: Path, silos: Path, **changes: Any) -> Any:
    changes.setdefault("model", {})["head"] = "stock"
    changes.setdefault("run", {}).setdefault("rounds", ROUNDS)
    return tiny_job(bert, silos, **changes)


def wide(job: Any) -> tuple[Parts, dict[str, ClientInfo], dict[str, Any]]:
    """The parts of a job on a float64 base, who the clients are, and their rows."""
    job, people = settle(job)
    infos = people.clients
    options = {"head": "stock", "classes": 2, "seed": job.run.seed, "dtype": torch.float64}
    base = load_base(job.model.name, **options)
    parts = Parts.of(job, infos.values(), base=base)
    head = head_policy(job, base, parts.task)
    parts = replace(parts, head=head)
    rows = {each.name: parts.encode(each)["train"] for each in people.federation.clients}
    return parts, infos, rows


def rounds_of(
    parts: Parts, half: ClientHalf, infos: dict[str, ClientInfo], rows: dict[str, Any]
) -> Iterator[dict[str, Outcome]]:
    """Each round's outcomes under the method's own server half."""
    method, head = parts.method, None
    stores: dict[str, Any] = {name: {} for name in infos}
    state = method.begin(list(infos.values()))
    for round in range(1, ROUNDS + 1):
        opened, found = method.open(state, round), {}
        for name, info in infos.items():
            content = method.offer(opened, round, info)
            offer = parts.head.beside(content, head, newcomer=False)
            found[name] = half.train(info, rows[name], offer, stores[name], round)
            stores[name] = found[name].store
        yield found
        updates = [each.update for each in found.values()]
        arrived = [
            replace(each, content=typed(method.Sent, each.content["method"])) for each in updates
        ]
        state = method.aggregate(state, round, arrived)
        head = parts.head.aggregate(head, updates)


def tensors(value: Any, path: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of a tree by its path."""
    if isinstance(value, torch.Tensor):
        yield path, value.as_subclass(torch.Tensor)
    elif isinstance(value, dict):
        for key in value:
            yield from tensors(value[key], f"{path}/{key}")
    elif isinstance(value, (list, tuple)):
        for number, each in enumerate(value):
            yield from tensors(each, f"{path}/{number}")
    elif is_dataclass(value):
        for each in fields(value):
            yield from tensors(getattr(value, each.name), f"{path}/{each.name}")


JOBS: dict[str, dict[str, Any]] = {
    "fedit": {"train": {"schedule": "cosine", "warmup_fraction": 0.2}},
    "local": {"lora": {"dora": True}},
    "ffa-lora": {"federation": {"head": "shared"}},
    "fedsa-lora": {"train": {"head_lr": 2e-3, "accumulation": 1}},
    "flora": {"federation": {"ranks": [2, 4]}},
    "flexlora": {"federation": {"ranks": [2, 4]}, "train": {"clip": 0.05}},
    "fed-plora": {"federation": {"ranks": [2, 4]}, "lora": {"scaling": "global"}},
    "hetlora": {"method": {"variant": "reduced"}, "federation": {"ranks": [2, 4]}},
    "fedtreelora": {"method": {"warmup_rounds": 1}},
}


@pytest.mark.parametrize("method", JOBS)
def test_it_equals_our_kernel_in_float64(
    method: str, tiny_bert: Path, silos: Path, tmp_path: Path
) -> None:
    changes = {key: dict(value) for key, value in JOBS[method].items()}
    changes.setdefault("method", {})["name"] = method
    parts, infos, rows = wide(stock_job(tiny_bert, silos, **changes))
    make = partial(trainer_of, tmp_path, kind=InOrder, dtype=torch.float64)
    ours = rounds_of(parts, parts.client_half(), infos, rows)
    theirs = rounds_of(parts, half_of(parts, make), infos, rows)
    for one, other in zip(ours, theirs, strict=True):
        for name in infos:
            assert one[name].steps == other[name].steps == 3
            assert other[name].loss == pytest.approx(one[name].loss, rel=1e-6)
            for part in ("update", "store"):
                left = dict(tensors(getattr(one[name], part)))
                right = dict(tensors(getattr(other[name], part)))
                assert left.keys() == right.keys()
                for key, value in left.items():
                    torch.testing.assert_close(right[key], value, rtol=0, atol=1e-11, msg=key)


def test_a_run_with_trainers_for_clients(tiny_bert: Path, silos: Path, tmp_path: Path) -> None:
    """A script's own Trainer, its own order: it learns, and a stopped run goes on to the same."""
    job = stock_job(tiny_bert, silos, train={"local_steps": 6}, federation={"head": "shared"})
    make = partial(trainer_of, tmp_path / "out")
    with without_reports():
        result = run(job, tmp_path / "whole", engine=simulated(make))
        with pytest.raises(KeyboardInterrupt):
            run(job, tmp_path / "cut", engine=simulated(make), callbacks=[StopAfter(2)])
        run(job, tmp_path / "cut", engine=simulated(make), resume=True)
    assert adapters(tmp_path / "cut") == adapters(tmp_path / "whole")
    assert result.path.name == "whole"
    assert not list((tmp_path / "out").glob("checkpoint-*"))


PLAIN: dict[str, dict[str, Any]] = {"run": {"rounds": 1}, "train": {"local_steps": 1}}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model": {"head": "pooled"}}, 'model.head = "pooled" is a head of'),
        ({"privacy": {"example_clip": 1.0, "example_noise": 1.0}}, "privacy.example_clip clips"),
        ({"method": {"name": "hetlora"}}, "adds a penalty to the loss, which a Trainer cannot"),
        ({"method": {"name": "fedalt"}}, "mixes its terms by the input"),
        ({"method": {"name": "fedra"}}, "leaves out layers of the model"),
    ],
)
def test_what_a_trainer_cannot_carry_is_refused_before_anything_is_written(
    changes: dict[str, Any], said: str, tiny_bert: Path, silos: Path, tmp_path: Path
) -> None:
    given = {**PLAIN, **changes}
    job = stock_job(tiny_bert, silos, **{key: dict(value) for key, value in given.items()})
    if "model" in changes:
        job = job.replace(model=changes["model"])

    def never(who: Participant) -> Trainer:
        raise AssertionError("no Trainer is asked for")

    with pytest.raises(JobError, match=re.escape(said)):
        run(job, tmp_path / "run", engine=simulated(never))
    assert not list((tmp_path / "run").glob("*.toml"))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"per_device_train_batch_size": 2},
            "takes 1 batches of 2 rows a step, and the job 1 of 4",
        ),
        ({"rows": 3}, "has 3 rows, and the client says"),
        ({"dtype": torch.bfloat16}, "of another shape or precision"),
        ({"weights": 1.0}, "has other numbers"),
        ({"classes": 3}, "lacks 'classifier.weight' of the shape"),
        ({"peft": True}, "has adapters of PEFT already"),
        ({"model_init": True}, "makes its model anew"),
        ({"stops": True}, "The Trainer made 1 of 2 steps"),
    ],
)
def test_a_trainer_that_is_not_the_jobs_is_refused(
    changes: dict[str, Any], said: str, tiny_bert: Path, silos: Path, tmp_path: Path
) -> None:
    job = stock_job(tiny_bert, silos, run={"rounds": 1}, train={"local_steps": 2})
    job, people = settle(job)
    parts = Parts.of(job, people.clients.values())
    client = people.federation.clients[0]
    rows = parts.encode(client)["train"]

    def make(who: Participant) -> Trainer:
        given = dict(changes)
        kept = {key: given.pop(key) for key in list(given) if key not in ("dtype", BATCH)}
        trainer = trainer_of(tmp_path, who, **given)
        spoil(trainer, kept, who)
        return trainer

    half = half_of(parts, make)
    info = people.clients[client.name]
    content = parts.method.offer(parts.method.begin([info]), 1, info)
    with pytest.raises(FedgroveError, match=re.escape(said)):
        half.train(info, rows, {"method": content}, {}, 1)


BATCH = "per_device_train_batch_size"


class Stops(TrainerCallback):
    """Ends a training after its first step."""

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> Any:
        control.should_training_stop = True
        return control


def spoil(trainer: Any, how: dict[str, Any], who: Participant) -> None:
    """Make the Trainer one that the job did not agree on."""
    if "rows" in how:
        trainer.train_dataset = list(who.rows)[: how["rows"]]
    if "weights" in how:
        trainer.model.bert.embeddings.word_embeddings.weight.data += how["weights"]
    if "classes" in how:
        trainer.model.classifier = torch.nn.Linear(32, how["classes"])
    if "peft" in how:
        from peft import LoraConfig, inject_adapter_in_model

        inject_adapter_in_model(LoraConfig(target_modules=["query"]), trainer.model)
    if "model_init" in how:
        trainer.model_init = lambda: trainer.model
    if "stops" in how:
        trainer.add_callback(Stops())


def test_the_model_is_given_back_as_it_was_and_shares_our_weights(
    tiny_bert: Path, silos: Path, tmp_path: Path
) -> None:
    job, people = settle(stock_job(tiny_bert, silos, **PLAIN))
    parts = Parts.of(job, people.clients.values())
    client = people.federation.clients[0]
    made: list[Any] = []
    orders: list[list[int]] = []

    def make(who: Participant) -> Trainer:
        def seen(rows: Sequence[Any]) -> Any:
            orders[-1].extend(who.rows.index(row) for row in rows)
            return who.collate(rows)

        trainer = trainer_of(tmp_path, who)
        trainer.args.remove_unused_columns = False
        trainer.data_collator = seen
        made.append(trainer)
        return trainer

    half = half_of(parts, make)
    info = people.clients[client.name]
    rows = parts.encode(client)["train"]
    content = parts.method.offer(parts.method.begin([info]), 1, info)
    for round in (1, 2, 1):
        orders.append([])
        half.train(info, rows, {"method": content}, {}, round)
    assert orders[0] == orders[2] != orders[1]  # the job's seed, by round
    (trainer,) = made
    names = {name for name, _ in trainer.model.named_parameters()}
    assert names == {name for name, _ in parts.base.model.named_parameters()}
    assert all(parameter.requires_grad for parameter in trainer.model.parameters())
    assert not any(module._forward_hooks for module in trainer.model.modules())
    ours = parts.base.model.bert.embeddings.word_embeddings.weight
    assert trainer.model.bert.embeddings.word_embeddings.weight.data_ptr() == ours.data_ptr()
    assert trainer.args.max_steps == -1
