"""A pool from Python: made of directories, asked, measured, kept."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from fedgrove.adapters.adapter import Adapter
from fedgrove.adapters.assembly import Assembly
from fedgrove.adapters.routers import ROUTERS, ByExample, Choice
from fedgrove.adapters.tree import pack, typed, unpack
from fedgrove.aggregate.options import parsed
from fedgrove.federation.load import rows_of
from fedgrove.federation.readers import Row
from fedgrove.federation.tables import files_of, rows_at
from fedgrove.federation.tasks import TASKS
from fedgrove.federation.tasks.base import Example
from fedgrove.ground.errors import AdapterError, DataError, RunError
from fedgrove.ground.plain import Plain
from fedgrove.ground.toml import value_text
from fedgrove.interop import assembly_file, peft
from fedgrove.interop.assembly_file import save_assembly
from fedgrove.pools import build
from fedgrove.pools.build import Recipe
from fedgrove.pools.members import Location, PoolMember, members, places
from fedgrove.pools.options import COMPOSE, OPTIONS, check
from fedgrove.pools.signature import Kind, Signature, sign
from fedgrove.training.kernel import Kernel
from fedgrove.use.personal import POOL, ClientModel, kernel_for
from fedgrove.use.questions import questions
from fedgrove.use.result import Result

ABOUT = "pool.json"
MEMBERS = "members.safetensors"
ROUTER = "router."  # extras that all members share, and that may have been trained
TOP = 3  # how many members answer where nobody said


@dataclass(frozen=True, eq=False)
class Routes:
    """What each input gave each member. Shapes: b inputs, n members."""

    names: tuple[str, ...]
    weights: Float[Tensor, "b n"]
    scores: Float[Tensor, "b n"] | None  # what it was decided by; None where tokens decide
    layers: Mapping[int, Float[Tensor, "b n"]]  # by layer; {} where all layers have the same


class Pool:
    """Members on one base, and the router that chooses among them. Made by ``pool``, opened by
    ``open_pool``.
    """

    def __init__(
        self,
        found: Sequence[PoolMember],
        plan: Recipe,
        kernel: Kernel,
        assembly: Assembly | None = None,
    ):
        self.members, self.plan, self.kernel = list(found), plan, kernel
        self.card: Plain = _card(self.members)
        self.fallback = kernel.base.stock_head
        if assembly is None:
            assembly = build.assembly_of(self.members, plan, kernel.base.sites, self.fallback)
        self.assembly = assembly

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(each.name for each in self.members)

    @property
    def model(self) -> ClientModel:
        """What answers."""
        return ClientModel(self.kernel, self.assembly, self.card)

    def predict(self, texts: Sequence[Any]) -> list[Any]:
        """The most likely label of each text (or image); what a language model writes."""
        return self.model.predict(texts)

    def measures(self, rows: Sequence[Row], more: Sequence[str] = ()) -> Plain:
        """Every metric of the task on rows with their answers."""
        return self.model.measures(rows, more)

    def route(self, texts: Sequence[Any]) -> list[dict[str, float]]:
        """For each text (or image) what each member has of the answer, by name."""
        found = self.routes(questions(self.kernel.task, texts))
        table = found.weights.tolist()
        return [dict(zip(self.names, own, strict=True)) for own in table]

    def routes(self, rows: Sequence[Row]) -> Routes:
        """As ``route``, of checked rows, with what it was decided by."""
        examples = self.kernel.task.encode(rows, self.kernel.base.processor)
        return routes(self.kernel, self.assembly, self.names, examples)

    def without(self, *names: str) -> Pool:
        """The same pool with these members masked."""
        kept = [each for each in self.members if each.name not in names]
        if not kept:
            raise AdapterError("A pool without any member cannot answer.")
        plan = replace(self.plan, top_k=min(self.plan.top_k, len(kept)))
        few = build.assembly_of(kept, plan, self.kernel.base.sites, self.fallback)
        shared = [name for name in self.assembly.extras if name.startswith(ROUTER)]
        own = {name: self.assembly.extras[name] for name in shared if name in few.extras}
        return Pool(kept, plan, self.kernel, few.with_extras(own))

    def like(self, router: str, compose: str | None = None) -> Pool:
        """The same members by another router with its default keys."""
        plan = planned(router, compose, self.plan.top_k, {})
        return Pool(self.members, plan, self.kernel)

    def member(self, name: str) -> ClientModel:
        """One member as it is. Raises ``AdapterError`` for a name that the pool does not have."""
        heads = build.heads_of(self.members, self.fallback)
        for each, head in zip(self.members, heads, strict=True):
            if each.name == name:
                alone = build.alone(each, head)
                return ClientModel(self.kernel, alone, self.card)
        raise AdapterError(f"The pool has no member '{name}'; it has {', '.join(self.names)}.")

    def base(self) -> ClientModel:
        """The base alone, its states read by the mean of the members' heads."""
        heads = build.heads_of(self.members, self.fallback)
        head = build.mean_head(heads)
        base = Assembly(extras=build.head_extras(head))
        return ClientModel(self.kernel, base, self.card)

    def save(self, out: str | Path) -> Path:
        """Write the pool to a new directory, which ``fg.load`` reads too."""
        out = Path(out)
        refuse_used(out)
        out.parent.mkdir(parents=True, exist_ok=True)
        card = {
            **self.card,
            "method": POOL,
            "client": None,
            "peft": False,
            "why": self.why(),
        }
        about = json.dumps(self.about(), indent=2, ensure_ascii=False) + "\n"
        beside = {
            ABOUT: about.encode(),
            MEMBERS: pack(self._beside()),
        }
        save_assembly(out, self.assembly, card=card, beside=beside)
        return out

    def about(self) -> Plain:
        """What ``pool.json`` says."""
        return {
            "format": 1,
            "router": self.plan.router,
            "compose": self.plan.compose,
            "top_k": self.plan.top_k,
            "options": self.plan.options.model_dump(),
            "one_adapter": self.assembly.mix.linear,
            "labels": self.card["labels"],
            "base": self.members[0].base,
            "members": [_told(each) for each in self.members],
        }

    def _beside(self) -> dict[str, Any]:
        """What a member has beside its term: its head, its signature; its adapter where the assembly
        has no term of it.
        """
        terms = {term.name for term in self.assembly.terms}
        found: dict[str, Any] = {}
        for each in self.members:
            own: dict[str, Any] = {"head": each.head, "labels": each.card["labels"]}
            if each.name not in terms:
                own["adapter"] = each.adapter
            if each.signature is not None:
                own["signature"] = each.signature
            found[each.name] = own
        return found

    def why(self) -> str:
        """Why the pool is no PEFT adapter, as a sentence."""
        if self.assembly.mix.linear:
            return (
                "A pool keeps its members apart; fedgrove export writes the one adapter that computes "
                "this one."
            )
        return (
            f"The router {self.plan.router} chooses among {len(self.members)} LoRA adapters anew for "
            "each input, which no PEFT adapter and no merged model can; fedgrove export --client "
            "writes a member."
        )


# ------------------------------------------------------------------------- making
def pool(
    folders: Sequence[str | Path],
    *,
    router: str = "arrow",
    compose: str | None = None,
    top_k: int | None = None,
    options: Mapping[str, Any] | Sequence[str] = (),
    signature: Kind | None = None,
    samples: Mapping[str, str | Path] | None = None,
    noise: float = 0.0,
    seed: int = 0,
    base: str | None = None,
    device: str = "cpu",
    dtype: str | None = None,
) -> Pool:
    """A pool of finished adapters.

    Args:
        folders: runs (their clients that trained) and adapter directories of anybody.
        router: ``retrieve``, ``arrow``, ``roc``, ``attention`` or ``uniform``.
        compose: ``mixture``, ``fusion`` or ``ensemble``, where the router has them.
        top_k: how many members answer an input; not given, 3, or all where there are fewer.
        options: the router's keys, as a table or as texts ``KEY=VALUE``.
        signature: sign the members of runs on their own training rows: ``mean`` or ``gaussian``.
        samples: by member, a table to sign it on, with the job's columns (``text``, ``label``).
        noise: of signatures of the kind mean that are made here.
        seed: of the examples that are signed.
        base: the one base of all, where they call it differently.
        dtype: the base's precision, by default the one that the first member's run used.

    Raises ``FedgroveError`` in one sentence, before anything is written.
    """
    wanted = top_k
    if wanted is None:
        wanted = TOP
    plan = planned(router, compose, wanted, options)
    found = members(places(folders), base)
    if top_k is None:
        plan = replace(plan, top_k=min(TOP, len(found)))
    kernel = kernel_of(found, device, dtype)
    found = _signed(found, kernel, plan, signature, samples or {}, noise, seed)
    return Pool(found, plan, kernel)


def planned(
    router: str,
    compose: str | None,
    top_k: int,
    options: Mapping[str, Any] | Sequence[str],
) -> Recipe:
    """What was chosen, checked."""
    if router in COMPOSE and compose is None:
        compose = COMPOSE[router][0]
    check(router, str(compose))
    way = next(each for each in COMPOSE[router] if each == compose)
    if isinstance(options, Mapping):
        options = [f"{key}={value_text(value)}" for key, value in options.items()]
    if top_k < 1:
        raise AdapterError(f"--top-k {top_k}: give 1 or more.")
    if router == "uniform":
        top_k = 1
    chosen = parsed(options, OPTIONS[router], f"the router {router}")
    return Recipe(router, way, top_k, chosen)


def kernel_of(
    found: Sequence[PoolMember],
    device: str = "cpu",
    dtype: str | None = None,
) -> Kernel:
    """The members' base with the sites of all; every member's shapes are checked."""
    whole: Adapter = {}
    for each in found:
        whole = {**each.adapter, **whole}
    card = _card(found)
    kernel = kernel_for(
        found[0].place.folder,
        card,
        whole,
        device=device,
        dtype=dtype,
    )
    for each in found:
        kernel_for(
            each.place.folder,
            card,
            whole | each.adapter,
            device=device,
            dtype=dtype,
        )
    return kernel


def _signed(
    found: Sequence[PoolMember],
    kernel: Kernel,
    plan: Recipe,
    kind: Kind | None,
    samples: Mapping[str, str | Path],
    noise: float,
    seed: int,
) -> list[PoolMember]:
    """The members with the signatures that were asked for."""
    known = {each.name for each in found}
    for name in samples:
        if name not in known:
            raise AdapterError(
                f"--samples {name}=...: the pool has no such member; it has {', '.join(known)}."
            )
    made: list[PoolMember] = []
    trains: dict[Path, dict[str, list[Row]]] = {}
    wanted = kind or build.READS[plan.router] or "mean"
    for each in found:
        run = each.place.run
        rows: list[Row] | None = None
        if each.name in samples:
            rows = table_of(Path(samples[each.name]), each.place, kernel)
        elif kind is not None and run is not None:
            if run not in trains:
                trains[run] = training_rows(run)
            rows = trains[run][each.name]
        if rows is None:
            made.append(each)
            continue
        signature = sign_member(each, kernel, rows, wanted, noise=noise, seed=seed)
        made.append(replace(each, signature=signature))
    return made


def sign_member(
    member: PoolMember,
    kernel: Kernel,
    rows: Sequence[Row],
    kind: Kind,
    *,
    noise: float,
    seed: int,
) -> Signature:
    """The member's signature on these rows."""
    return sign(
        kernel,
        rows,
        kind,
        base=str(member.card["model"]),
        revision=member.card.get("revision"),
        seed=seed,
        noise=noise,
        whose=member.name,
    )


def training_rows(run: Path) -> dict[str, list[Row]]:
    """Each client's training rows, of a run whose data lie here, as they were."""
    from fedgrove.federation import build as federation_of

    result = Result(run)
    _ = result.tests  # raises where the data have changed
    return {client.name: client.train for client in federation_of(result.job).clients}


def table_of(
    path: Path,
    place: Location | None,
    kernel: Kernel,
) -> list[Row]:
    """The rows of a table: with the columns of the member's job, or by the task's own names. Raises
    ``DataError``.
    """
    if place is not None and place.run is not None:
        return rows_of(path, Result(place.run).job)
    task = kernel.task
    if task.folders and path.is_dir():
        images = sorted(each for each in path.rglob("[!.]*") if each.is_file())
        return [{task.asks: str(each), task.learns: each.parent.name} for each in images]
    if not files_of(path):
        raise DataError(f"the table {path} does not exist; name one file")
    columns = [task.asks, task.learns]
    rows = [dict(values) for _, values in rows_at(path, columns, None)]
    if not rows:
        raise DataError(f"the table {path} has no rows; give a file with rows")
    return rows


# ------------------------------------------------------------------------- opening
def is_pool(folder: Path) -> bool:
    """Whether a directory holds a pool."""
    return (folder / ABOUT).is_file()


def open_pool(folder: str | Path, *, device: str = "cpu") -> Pool:
    """A pool that was saved. Its members' own directories are not needed."""
    folder = Path(folder)
    if not is_pool(folder):
        raise RunError(f"{folder} is no pool; name a directory that `fedgrove pool` wrote.")
    about = peft.read_json(folder / ABOUT)
    try:
        return _opened(folder, about, device)
    except (KeyError, TypeError, StopIteration) as error:
        raise AdapterError(
            f"{folder / ABOUT} lacks a part of its description ({error}); make the pool again."
        ) from error


def _opened(
    folder: Path,
    about: Plain,
    device: str,
) -> Pool:
    assembly = assembly_file.read_assembly(folder, ROUTERS)
    beside = unpack((folder / MEMBERS).read_bytes())
    adapters = {term.name: term.adapter for term in assembly.terms}
    card = peft.read_json(folder / peft.CARD)
    found = [_kept(told, beside[told["name"]], adapters, card) for told in about["members"]]
    plan = planned(
        about["router"],
        about["compose"],
        about["top_k"],
        about["options"],
    )
    return Pool(found, plan, kernel_of(found, device), assembly)


def _kept(
    told: Plain,
    beside: Plain,
    adapters: Mapping[str, Adapter],
    card: Plain,
) -> PoolMember:
    """A member out of the pool's own files."""
    run = signature = None
    if told["run"]:
        run = Path(told["run"])
    if "signature" in beside:
        signature = typed(Signature, beside["signature"])
    adapter = adapters.get(told["name"]) or beside["adapter"]
    own = {**card, "labels": beside["labels"]}
    place = Location(told["name"], Path(told["folder"]), run)
    return PoolMember(
        place,
        dict(adapter),
        beside["head"],
        own,
        told["sha256"],
        signature,
    )


def refuse_used(out: Path) -> None:
    """Raises ``RunError`` for a directory that holds something."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RunError(f"{out} exists already; name a new directory.")


def _card(found: Sequence[PoolMember]) -> Plain:
    """What the pool is beside its weights: as its first member."""
    card = found[0].card
    own = TASKS.find(card["task"]).from_card(card).card()
    kept = {key: card.get(key) for key in ("model", "revision", "head", "dtype")}
    return {"format": 1, **own, **kept}


def _told(member: PoolMember) -> Plain:
    signature = member.signature
    run = None
    if member.place.run:
        run = str(member.place.run)
    words = None
    if signature:
        words = signature.words()
    return {
        "name": member.name,
        "folder": str(member.place.folder),
        "run": run,
        "sha256": member.sha256,
        "rank": member.rank,
        "signature": words,
    }


# ------------------------------------------------------------------------- routes
@torch.inference_mode()
def routes(
    kernel: Kernel,
    assembly: Assembly,
    names: tuple[str, ...],
    examples: Sequence[Example],
) -> Routes:
    """What each example gives each member, in order; by its features alone where they decide."""
    mix = assembly.mix
    if not mix.routes:
        even = torch.full((len(examples), len(names)), 1 / len(names), dtype=torch.float64)
        return Routes(names, even, None, {})
    rows: dict[int, Tensor] = {}
    scores: dict[int, Tensor] = {}
    layers: dict[int, dict[int, Tensor]] = {}
    with kernel.opened(assembly, train=False) as live:
        for indices, batch in kernel.passes(live, examples):
            choice = live.choice
            if isinstance(choice, Choice):
                scores.update(zip(indices, choice.scores.cpu(), strict=True))
            if isinstance(mix, ByExample) and isinstance(choice, Choice):
                rows.update(zip(indices, choice.weights.cpu(), strict=True))
                continue
            kernel.reader.answer(live, batch)
            assert live.tally is not None
            rows.update(zip(indices, live.tally.shares().cpu(), strict=True))
            for layer, each in live.tally.by_layer().items():
                layers.setdefault(layer, {}).update(zip(indices, each.cpu(), strict=True))
    decided = None
    if scores:
        decided = _ordered(scores)
    by_layer = {layer: _ordered(each) for layer, each in layers.items()}
    return Routes(names, _ordered(rows), decided, by_layer)


def _ordered(rows: Mapping[int, Float[Tensor, " n"]]) -> Float[Tensor, "b n"]:
    ordered = [rows[index] for index in range(len(rows))]
    return torch.stack(ordered).double()
