"""The server's defence in a run: changes are bounded, means are robust, and who was cut is told."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from fedgrove.adapters.centre import defended
from fedgrove.adapters.tree import leaves
from fedgrove.defence.changes import Changes
from fedgrove.defence.rules import RULES, Rule, ratios, squared_distances, usable
from fedgrove.ground.plain import Plain
from fedgrove.methods.contract import Update

if TYPE_CHECKING:
    from fedgrove.job.defence import DefenceSection

FOOLSGOLD = "foolsgold"


@dataclass
class RobustMean:
    """A rule while the server's half works; ``adapters.centre`` asks it."""

    rule: Rule
    share: float
    owner: Mapping[int, str]  # by identity of the tensors that they sent
    kept: dict[str, list[float]] = field(default_factory=dict)

    def weights(
        self,
        members: Sequence[Tensor],
        gram: Float[Tensor, "n n"],
        shares: Sequence[float],
    ) -> list[float]:
        f = usable(self.rule, self.share, len(members))
        if self.rule.weigh is None or f == 0:
            return list(shares)
        given = torch.tensor(shares, dtype=torch.float64)
        distances = squared_distances(gram)
        found = self.rule.weigh(distances, given, f)
        left = ratios(found, shares)
        for member, ratio in zip(members, left, strict=True):
            client = self.owner.get(id(member))
            if client is not None:
                self.kept.setdefault(client, []).append(ratio)
        return [float(share) for share in found]

    def value(
        self, stack: Float[Tensor, "n ..."], shares: Float[Tensor, " n"]
    ) -> Float[Tensor, ...] | None:
        f = usable(self.rule, self.share, len(stack))
        if self.rule.value is None or f == 0:
            return None
        return self.rule.value(stack, shares, f)


@dataclass
class Shield:
    """The defence of one run. Its only state is what FoolsGold remembers."""

    section: DefenceSection
    history: dict[str, Tensor] = field(default_factory=dict)  # by client, the sum of its changes
    lines: list[Plain] = field(default_factory=list)  # by round and client, what was cut
    _newest: list[Plain] = field(default_factory=list)  # of the last try of the present round

    @contextmanager
    def over(
        self,
        number: int,
        updates: Sequence[Update],
        changes: Changes,
    ) -> Iterator[Sequence[Update]]:
        """The updates as the server's half sees them, and its means while it works.

        Asked twice for one round it gives the same.
        """
        if not self.section.active:
            yield updates
            return
        scales = self._scales(updates, changes)
        seen = []
        for update in updates:
            scale = scales[update.client]
            if scale < 1:
                update = changes.scaled(update, scale)
            seen.append(update)
        rule = RULES.get(self.section.rule)
        robust: RobustMean | None = None
        within: AbstractContextManager[None] = nullcontext()
        if rule is not None:
            robust = RobustMean(rule, self.section.attackers, _owners(seen))
            within = defended(robust)
        with within:
            yield seen
        self._newest = []
        for update in updates:
            line: Plain = {
                "round": number,
                "client": update.client,
                "scale": round(scales[update.client], 6),
            }
            if robust and update.client in robust.kept:
                of_groups = robust.kept[update.client]
                mean = sum(of_groups) / len(of_groups)
                line["weight"] = round(mean, 6)
            self._newest.append(line)

    def used(self, updates: Sequence[Update], changes: Changes) -> None:
        """The round counts: it is told, and FoolsGold remembers it."""
        if not self.section.active:
            return
        self.lines.extend(self._newest)
        if self.section.rule != FOOLSGOLD:
            return
        for update in updates:
            vector = changes.vector(update)
            known = self.history.get(update.client)
            if known is None or known.shape != vector.shape:
                self.history[update.client] = vector
            else:
                self.history[update.client] = known + vector

    def notes(self) -> Plain:
        """For a checkpoint."""
        return {"history": dict(self.history), "lines": list(self.lines)}

    def restore(self, notes: Plain) -> None:
        """Put back what a checkpoint held."""
        self.history = dict(notes["history"])
        self.lines = list(notes["lines"])

    # -------------------------------------------------------------------- scales
    def _scales(self, updates: Sequence[Update], changes: Changes) -> dict[str, float]:
        """What each client's change is multiplied by, at most 1."""
        scales = {update.client: 1.0 for update in updates}
        if self.section.norm is not None:
            norms: dict[str, float] = {}
            for update in updates:
                norms[update.client] = float(changes.vector(update).norm())
            most = self._bound(list(norms.values()))
            for client, norm in norms.items():
                if norm > most:
                    scales[client] = most / norm
        if self.section.rule == FOOLSGOLD:
            for client, credit in self._credits(updates, changes).items():
                scales[client] *= credit
        return scales

    def _bound(self, norms: Sequence[float]) -> float:
        if self.section.norm == "median":
            found = torch.tensor(norms, dtype=torch.float64)
            return float(found.median())
        return float(self.section.norm or 0.0)

    def _credits(self, updates: Sequence[Update], changes: Changes) -> dict[str, float]:
        rows = []
        for update in updates:
            vector = changes.vector(update)
            known = self.history.get(update.client)
            if known is not None and known.shape == vector.shape:
                vector = vector + known
            rows.append(vector)
        sizes = {len(row) for row in rows}
        if len(rows) < 2 or len(sizes) > 1:
            return {}
        credits = foolsgold(torch.stack(rows))
        names = [update.client for update in updates]
        return dict(zip(names, credits.tolist(), strict=True))


def foolsgold(sums: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
    """Fung et al. 2020 (1808.04866): clients whose summed changes point the same way lose credit.

    Cosines with pardoning (``cs_ij ← cs_ij v_i / v_j`` where ``v_i < v_j``, v the largest cosine of
    each), credit ``1 − max_j cs_ij`` divided by the largest, then a logit that is cut to [0, 1].
    """
    unit = torch.nn.functional.normalize(sums.double(), dim=1)
    cosines = unit @ unit.T
    cosines.fill_diagonal_(-1.0)
    most = cosines.max(1).values
    own, others = most[:, None], most[None, :]
    pardoned = cosines * (own / others)
    cosines = torch.where(own < others, pardoned, cosines)
    cosines.fill_diagonal_(-torch.inf)
    nearest = cosines.max(1).values
    credit = (1 - nearest).clamp(0.0, 1.0)
    if not bool(credit.any()):
        return torch.ones_like(credit)  # all the same: nobody is told from anybody
    credit = credit / credit.max()
    credit = credit.clamp(max=0.99)
    logit = torch.log(credit / (1 - credit))
    return (logit + 0.5).clamp(0.0, 1.0)


def _owners(updates: Sequence[Update]) -> dict[int, str]:
    """Whose tensor is whose, while the updates are alive."""
    found: dict[int, str] = {}
    for update in updates:
        for _, tensor in leaves(update.content):
            found[id(tensor)] = update.client
    return found
