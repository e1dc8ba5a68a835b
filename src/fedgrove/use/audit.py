"""How well an attacker tells the rows that a client was trained on from rows that it never saw.

An attack gives every row a number, larger for what it takes for a member. Members are a client's
training rows, the others its test rows, so the figures mean something where both are drawn alike (a
random split is; test rows of another year are not).

- ``loss``: minus the loss of the model that the client left with (Yeom et al., CSF 2018). Anybody who
  holds the adapter and the head can do it.
- ``gain``: by how much the adapter lowers a row's loss below that of the same head on the untouched
  base: easy rows are no members for that (difficulty calibration: Watson et al., ICLR 2022).
- ``update``: minus the cosine between the row's gradient at the model that the client was offered and the
  change that it answered with (Li et al., ICLR 2023). A server that sees one client's update can do
  it. Measured on the client's first round, which reads the most, in what may travel alone; where the
  server sees sums alone, it says what would be seen if one were opened.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from fedgrove.adapters.assembly import Assembly, Extra, Term
from fedgrove.federation.tasks import Example
from fedgrove.ground.errors import RunError
from fedgrove.ground.files import write_json
from fedgrove.ground.plain import Plain
from fedgrove.ground.seeds import generator
from fedgrove.ground.statistics import interval
from fedgrove.training.kernel import Kernel
from fedgrove.use.adapt import reopened, trained_in
from fedgrove.use.result import Result

if TYPE_CHECKING:
    from fedgrove.training.client import ClientHalf

FILE = "audit.json"  # in the run's directory
ATTACKS = ("loss", "gain", "update")
FALSE_ALARMS = (
    0.05  # the share of others taken for members at which the share of members found is told
)

Scores = Float[np.ndarray, " n"]


@dataclass(frozen=True)
class Found:
    """What one attack came to on one client: its numbers for members and for others."""

    members: Scores
    others: Scores


@dataclass(frozen=True)
class Outcome:
    """What one attack came to over the clients.

    ``auc``: the chance that a member's number is above another row's, the mean over clients (0.5: a
    coin), with its 95 % interval over clients (percentile bootstrap; None of one client). ``found``:
    the share of members that it names when it is wrong about ``FALSE_ALARMS`` of the others,
    numbers standardised within each client by its others.
    """

    attack: str
    auc: float
    interval: tuple[float, float] | None
    found: float
    by_client: dict[str, float]


def audit(
    run: str | Path,
    attacks: Sequence[str] = ATTACKS,
    *,
    examples: int = 50,
    clients: int | None = None,
    seed: int = 0,
    advance: Callable[[str], None] = lambda _: None,
) -> list[Outcome]:
    """Try attacks on a finished run's clients; the outcomes also go to ``RUN/audit.json``.

    Args:
        examples: at most so many members and as many others of each client.
        clients: at most so many clients, drawn by ``seed`` (default all that trained).
        advance: hears a client's name when it is done.

    An attack that has nothing to see (no adapter travels) is left out. Raises ``RunError``: the run
    is not finished, its data changed, an unknown attack, no client with two rows of each kind.
    """
    if unknown := [name for name in attacks if name not in ATTACKS]:
        raise RunError(f"There is no attack {unknown[0]!r}; choose from {', '.join(ATTACKS)}.")
    result = Result(run)
    victims = _victims(result, examples, clients, seed)
    found: dict[str, dict[str, Found]] = {name: {} for name in attacks}
    attacker = Attacker(result)
    for name, (members, others) in victims.items():
        for attack, numbers in attacker.numbers(attacks, name, members, others).items():
            found[attack][name] = numbers
        advance(name)
    outcomes = [outcome(name, each) for name, each in found.items() if each]
    write_json(result.path / FILE, told(outcomes, examples, seed))
    return outcomes


def told(outcomes: Iterable[Outcome], examples: int, seed: int) -> Plain:
    """The content of ``audit.json``."""
    attacks = {
        each.attack: {
            "auc": each.auc,
            "interval": each.interval,
            "found": each.found,
            "by_client": each.by_client,
        }
        for each in outcomes
    }
    return {"format": 1, "examples": examples, "seed": seed, "false_alarms": FALSE_ALARMS} | {
        "attacks": attacks
    }


Rows = list[int]  # of a client's split


def _victims(
    result: Result,
    examples: int,
    clients: int | None,
    seed: int,
) -> dict[str, tuple[Rows, Rows]]:
    """Of each client that is attacked, which training and which test rows."""
    chosen: dict[str, tuple[Rows, Rows]] = {}
    for client in result.federation.clients:
        count = min(examples, len(client.train), len(client.test))
        if client.held_out or count < 2:
            continue
        members = _drawn(len(client.train), count, seed, client.name, "members")
        others = _drawn(len(client.test), count, seed, client.name, "others")
        chosen[client.name] = (members, others)
    if not chosen:
        raise RunError(f"No client of {result.path} has two training and two test rows to compare.")
    names = list(chosen)
    if clients is not None and clients < len(names):
        kept = _drawn(len(names), clients, seed, "clients")
        names = [names[number] for number in kept]
    return {name: chosen[name] for name in names}


def _drawn(all: int, count: int, seed: int, *purpose: str) -> Rows:
    drawn = torch.randperm(all, generator=generator(seed, "audit", *purpose))
    return sorted(drawn[:count].tolist())


class Attacker:
    """A finished run's parts, and what each attack makes of a client's rows."""

    def __init__(self, result: Result):
        self.result = result
        self.clients = {client.name: client for client in result.federation.clients}
        self.infos = {info.name: info for info in trained_in(result)}
        self.parts = reopened(result, result.job)
        #: each step that the client at hand trained, before and after
        self._steps: list[tuple[Assembly, Assembly]] = []

    @cached_property
    def _half(self) -> ClientHalf:
        return self.parts.client_half(watch=self._note)

    @cached_property
    def _begun(self) -> Any:
        """The server's state in the first round."""
        method = self.parts.method
        return method.open(method.begin(list(self.infos.values())), 1)

    def _note(self, _: tuple[object, ...], before: Assembly, after: Assembly) -> None:
        self._steps.append((before, after))

    def numbers(
        self,
        attacks: Sequence[str],
        client: str,
        members: Rows,
        others: Rows,
    ) -> dict[str, Found]:
        """Of each attack that has something to see."""
        encoded = self.parts.encode(self.clients[client])
        train, test = encoded["train"], encoded["test"]
        rows = [train[each] for each in members] + [test[each] for each in others]
        scores: dict[str, Scores] = {}
        if {"loss", "gain"} & set(attacks):
            scores = self._of_losses(client, rows, calibrated="gain" in attacks)
        if "update" in attacks:
            seen = self._of_update(client, train, rows)
            if seen is not None:
                scores["update"] = seen
        count = len(members)
        return {
            name: Found(scores[name][:count], scores[name][count:])
            for name in attacks
            if name in scores
        }

    def _of_losses(
        self,
        client: str,
        rows: Sequence[Example],
        *,
        calibrated: bool,
    ) -> dict[str, Scores]:
        model = self.result.client(client).model()
        losses = np.array(list(model.kernel.each_loss(model.assembly, rows)))
        found = {"loss": -losses}
        if calibrated:
            bare = replace(model.assembly, terms=(), base_delta=None)
            found["gain"] = np.array(list(model.kernel.each_loss(bare, rows))) - losses
        return found

    def _of_update(
        self,
        client: str,
        train: Sequence[Example],
        rows: Sequence[Example],
    ) -> Scores | None:
        """None where nothing that trained may travel."""
        parts, info = self.parts, self.infos[client]
        content = parts.method.offer(self._begun, 1, info)
        self._steps.clear()
        self._half.train(info, train, parts.head.beside(content, None, newcomer=False), {}, 1)
        kernel = self._half.kernel
        scores = np.zeros(len(rows))
        seen = False
        for before, after in self._steps:
            change = _line(kernel, travelling(after)) - _line(kernel, travelling(before))
            if not change.norm():
                continue
            seen = True
            each = kernel.each_gradient(travelling(before), rows)
            scores += [-cosine(gradient, change) for gradient in each]
        return scores if seen else None


def travelling(assembly: Assembly) -> Assembly:
    """The same model with only that in training which may leave the client."""
    terms: list[Term] = []
    for term in assembly.terms:
        letters = [letter for letter in term.train if letter not in term.private]
        terms.append(replace(term, train="".join(letters)))
    extras: dict[str, Extra] = {}
    for name, extra in assembly.extras.items():
        extras[name] = replace(extra, train=extra.train and extra.home == "server")
    return replace(assembly, terms=tuple(terms), extras=extras)


def _line(kernel: Kernel, assembly: Assembly) -> Float[Tensor, " n"]:
    """All that trains, side by side; [0] where nothing does."""
    with kernel.opened(assembly, train=True) as live:
        leaves = [leaf.detach().flatten().cpu() for leaf in live.leaves]
    return torch.cat([torch.zeros(0), *leaves])


def cosine(one: Float[Tensor, " n"], other: Float[Tensor, " n"]) -> float:
    """0 where one of them is nothing."""
    lengths = float(one.norm() * other.norm())
    if lengths == 0.0 or not math.isfinite(lengths):
        return 0.0
    return float(one @ other) / lengths


def outcome(attack: str, found: dict[str, Found]) -> Outcome:
    """One attack's figures over its clients."""
    from sklearn.metrics import roc_auc_score

    def area(each: Found) -> float:
        numbers = np.concatenate([each.members, each.others])
        return float(roc_auc_score(list(_truth(each)), numbers))

    areas = {name: area(each) for name, each in found.items()}
    values = np.array(list(areas.values()))
    ends = None
    if len(values) > 1:
        ends = interval(values, level=0.95, seed=0)
    return Outcome(attack, float(values.mean()), ends, share_found(found.values()), areas)


def _truth(each: Found) -> Iterator[int]:
    yield from (1 for _ in each.members)
    yield from (0 for _ in each.others)


def share_found(found: Iterable[Found]) -> float:
    """The share of members above the number that ``FALSE_ALARMS`` of the others reach."""
    members: list[float] = []
    others: list[float] = []
    for each in found:
        middle, spread = each.others.mean(), each.others.std() or 1.0
        members += ((each.members - middle) / spread).tolist()
        others += ((each.others - middle) / spread).tolist()
    bar = np.quantile(others, 1 - FALSE_ALARMS)
    return float(np.mean(np.array(members) > bar))
