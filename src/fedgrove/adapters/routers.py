"""Routers: mixes that send each input to some of many terms, without training (but for Attention).

Shapes: b examples, N tokens of all examples in one line, n terms (the members of a pool), r the rank
of one at a site, h hidden size, q axes of a covariance. At a site ``v_i = s_i B_i A_i x``. An
example reads a term's features ``z = f / ‖f‖``, f those of the untouched base.

* ``Retrieve``: LoraRetriever, arXiv 2402.09997 (ACL Findings 2024).
* ``Components``: HiLoRA-routing, arXiv 2510.12266. The published rule compares a density with 1,
  which the scale of the features decides; the default here is a quantile of the member's own.
* ``Arrow``: arXiv 2405.11157, weights only.
* ``Attention``: RAMoLE, arXiv 2406.16989.
* ``Even``: all alike.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from fedgrove.adapters.adapter import Factors
from fedgrove.adapters.assembly import Inner, Junction, Mix, Weight, Weighted
from fedgrove.ground.seeds import numpy_rng

Compose = Literal["mixture", "fusion", "ensemble"]


@dataclass(frozen=True, eq=False)
class Choice:
    """What each example gives each term (0: nothing, it is not run for it), and the scores that this
    was decided by.
    """

    weights: Float[Tensor, "b n"]
    scores: Float[Tensor, "b n"]
    #: of Components: how many components of each term, and what their sum is multiplied by
    budget: Int[Tensor, "b n"] | None = None
    gain: Float[Tensor, " b"] | None = None

    @cached_property
    def who(self) -> list[Int[Tensor, " rows"]]:
        """For each term the examples that chose it."""
        return [column.nonzero().flatten() for column in self.weights.T]

    def per(
        self,
        rows: Int[Tensor, " rows"],
        number: int,
        like: Float[Tensor, "rows ..."],
    ) -> Float[Tensor, "rows ..."]:
        """A term's weights in these examples, ready to multiply a tensor ``like`` this."""
        own = self.weights[rows, number]
        further = [1] * (like.ndim - 1)
        return own.view(-1, *further).to(like.dtype)


class Router(Mix):
    """A mix that routes."""

    linear = False
    routes = True


class ByExample(Router):
    """One choice for an example, from its features, at every site."""

    needs_features = True

    def weigh(self, at: Junction) -> Sequence[Weight]:
        choice = _choice(at)
        assert at.tally is not None
        at.tally.note(at.site.layer, choice.weights)
        return self.spread(at, choice)

    def spread(self, at: Junction, choice: Choice) -> list[Weight]:
        """The weights at a site."""
        return _mixture(at, choice)


@dataclass(frozen=True)
class Even(ByExample):
    """All terms alike, each run apart."""

    needs_features = False
    apart = True

    def choose(
        self,
        features: Float[Tensor, "b h"] | None,
        extras: Mapping[str, Tensor],
        examples: int,
    ) -> Choice:
        heads = {name.split(".")[1] for name in extras if name.startswith("heads.")}
        count = len(heads)
        weights = torch.full((examples, count), 1 / count, dtype=_dtype(extras))
        return Choice(weights, weights)


@dataclass(frozen=True)
class Retrieve(ByExample):
    """The ``top_k`` terms whose mean feature (extra ``signature.mean`` [n, h]) has the largest cosine
    with the example's, 1/k each.

    ``mixture``: ``(1/k) Σ v_i``; ``fusion``: ``s ((1/k) Σ B_i)((1/k) Σ A_i) x``, for equal ranks and
    scales; ``ensemble``: the mean of the terms' own probabilities.
    """

    top_k: int
    compose: Compose = "mixture"

    @property
    def apart(self) -> bool:  # type: ignore[override]
        return self.compose == "ensemble"

    def choose(
        self,
        features: Float[Tensor, "b h"] | None,
        extras: Mapping[str, Tensor],
        examples: int,
    ) -> Choice:
        scores = cosines(features, extras["signature.mean"])
        return Choice(top(scores, self.top_k), scores)

    def spread(self, at: Junction, choice: Choice) -> list[Weight]:
        if self.compose == "fusion":
            return _fusion(at, choice)
        return _mixture(at, choice)


@dataclass(frozen=True)
class Arrow(Router):
    """For each token the ``top_k`` largest ``|p_iᵀ x|``, p_i the first right singular vector of
    ``B_i A_i`` (extras ``prototypes.SITE`` [n, in], zero where a term lacks the site), softmaxed.
    ``cosine`` divides by ‖x‖, so that long tokens do not choose more sharply.
    """

    top_k: int
    score: Literal["inner", "cosine"] = "inner"

    def weigh(self, at: Junction) -> Sequence[Weight]:
        line = at.x.flatten(0, -2)
        prototypes = at.extras[f"prototypes.{at.site.name}"]
        scores = F.linear(line, prototypes).abs()
        if self.score == "cosine":
            norms = line.norm(dim=-1, keepdim=True)
            scores = scores / norms.clamp_min(_tiny(line))
        present = [factors is not None for factors in at.factors]
        if not any(present):
            return [0.0] * len(at.terms)
        has = torch.tensor(present, device=line.device)
        scores = scores.masked_fill(~has, -math.inf)
        count = min(self.top_k, sum(present))
        kept = top(scores, count) > 0
        scores = scores.masked_fill(~kept, -math.inf)
        weights = scores.softmax(-1)
        assert at.tally is not None
        at.tally.note_tokens(at.site.layer, weights)
        found: list[Weight] = []
        for number, factors in enumerate(at.factors):
            tokens = weights[:, number].nonzero().flatten()
            if factors is None or not len(tokens):
                found.append(0.0)
                continue
            share = weights[tokens, number, None]
            inner = F.linear(line[tokens], factors.A) * share
            found.append(Inner(inner, tokens))
        return found


@dataclass(frozen=True)
class Attention(Router):
    """Of the ``top_k`` retrieved terms (all, without signatures) each token's ``softmax(qᵀκ_i / √ρ)``,
    ``q = A_r x``, ``κ_i = B_rᵀ v_i``, from extras ``router.A.SITE`` [ρ, in] and ``router.B.SITE``
    [out, ρ], which all terms share and which train.

    ``leave_out``: in training, how likely each term is left out; two stay.
    """

    top_k: int
    retrieves: bool = True
    leave_out: float = 0.0

    @property
    def needs_features(self) -> bool:  # type: ignore[override]
        return self.retrieves

    def choose(
        self,
        features: Float[Tensor, "b h"] | None,
        extras: Mapping[str, Tensor],
        examples: int,
    ) -> Choice | None:
        if not self.retrieves:
            return None
        scores = cosines(features, extras["signature.mean"])
        return Choice(top(scores, self.top_k), scores)

    def weigh(self, at: Junction) -> Sequence[Weight]:
        line = at.x.flatten(0, -2)
        allowed = self._allowed(at, len(line))
        query = F.linear(line, at.extras[f"router.A.{at.site.name}"])
        up = at.extras[f"router.B.{at.site.name}"]
        inner: list[Tensor | None] = []
        logits: list[Tensor] = []
        size = math.sqrt(query.shape[-1])
        for factors in at.factors:
            if factors is None:
                inner.append(None)
                logits.append(line.new_zeros(len(line)))
                continue
            own = F.linear(line, factors.A)
            shared = factors.scale * (up.T @ factors.B)
            keys = F.linear(own, shared)
            inner.append(own)
            fit = (query * keys).sum(-1)
            logits.append(fit / size)
        scores = torch.stack(logits, -1).masked_fill(~allowed, -math.inf)
        weights = scores.softmax(-1)
        assert at.tally is not None
        at.tally.note_tokens(at.site.layer, weights)
        found: list[Weight] = []
        for number, down in enumerate(inner):
            part = _attended(down, weights[:, number], allowed[:, number])
            found.append(part)
        return found

    def _allowed(self, at: Junction, count: int) -> Tensor:
        """[N, n]: which terms a token may attend to."""
        if at.choice is None:
            return torch.ones(count, len(at.terms), dtype=torch.bool, device=at.x.device)
        weights = _choice(at).weights
        return (weights > 0).repeat_interleave(count // len(weights), 0)


@dataclass(frozen=True)
class Components(ByExample):
    """A budget of rank-1 components for each example, dealt to the terms whose Gaussian its features
    fit; of each term those that answer a token most.

    With ``g_i = (1/h) log N(z; μ_i, S_i)`` (extras ``signature.*``) the candidates C are the terms
    above their own threshold, else the ``top_k`` best. ``O = max(1, ⌊γ Σ_C r_i⌋)`` components are
    dealt by ``π ∝ e^{g_i/τ}`` on C, ``o_i ≤ r_i``. Per token, of term i the ``o_i`` components with
    the largest ``|a_jᵀ x|`` (``svd``: times σ_j), the sum times ``η = √(mean_C r_i / O)``.
    """

    top_k: int
    gamma: float = 0.4
    tau: float = 0.02
    threshold: Literal["quantile", "density"] = "quantile"
    sampling: Literal["remainder", "multinomial"] = "remainder"
    components: Literal["svd", "trained"] = "svd"
    normalise: bool = True
    seed: int = 0

    def choose(
        self,
        features: Float[Tensor, "b h"] | None,
        extras: Mapping[str, Tensor],
        examples: int,
    ) -> Choice:
        assert features is not None
        scores = densities(unit(features), extras)
        ranks = extras["signature.rank"].long().tolist()
        limits = extras["signature.threshold"]
        budget = torch.zeros(scores.shape, dtype=torch.long)
        gain = torch.ones(len(scores), dtype=scores.dtype)
        for row, own in enumerate(scores):
            chosen = self._candidates(own, limits)
            caps = [ranks[i] for i in chosen]
            total = max(1, math.floor(self.gamma * sum(caps) + 1e-9))
            fit = own[chosen].double() / self.tau
            odds = torch.softmax(fit, 0).tolist()
            if self.sampling == "multinomial":
                dealt = drawn(total, odds, caps, self.seed, own)
            else:
                dealt = remainders(total, odds, caps)
            budget[row, chosen] = torch.tensor(dealt)
            if self.normalise:
                mean = sum(caps) / len(caps)
                gain[row] = math.sqrt(mean / total)
        budget = budget.to(scores.device)
        gain = gain.to(scores.device)
        totals = budget.sum(1, keepdim=True)
        weights = budget.to(scores.dtype) / totals
        return Choice(weights, scores, budget, gain)

    def _candidates(self, scores: Float[Tensor, " n"], limits: Float[Tensor, " n"]) -> list[int]:
        """Which terms may answer an example with these scores, in order."""
        if self.threshold == "quantile":
            found = (scores > limits).nonzero().flatten().tolist()
            least = self.top_k
        else:
            found = (scores > 0).nonzero().flatten().tolist()
            best_score = float(scores.max())
            least = max(math.ceil(abs(best_score)), self.top_k)
        if found:
            return [int(each) for each in found]
        count = min(least, len(scores))
        best = scores.topk(count).indices.tolist()
        return sorted(int(each) for each in best)

    def spread(self, at: Junction, choice: Choice) -> list[Weight]:
        assert choice.budget is not None
        assert choice.gain is not None
        found: list[Weight] = [0.0] * len(choice.who)
        for own in _chosen(at, choice):
            number, factors, rows = own.number, own.factors, own.rows
            each = len(own.tokens) // len(rows)
            inner = F.linear(own.x, factors.A)
            score = inner.abs()
            if self.components == "svd":
                score = score * factors.B.norm(dim=0)
            order = score.argsort(dim=-1, descending=True, stable=True)
            place = order.argsort(dim=-1)
            budget = choice.budget[rows, number].repeat_interleave(each)
            kept = place < budget[:, None]
            gain = choice.gain[rows].to(inner.dtype).repeat_interleave(each)
            found[number] = Inner(inner * kept * gain[:, None], own.tokens)
        return found


#: what ``assembly.safetensors`` of a pool may name
ROUTERS: tuple[type[Mix], ...] = (Arrow, Attention, Components, Even, Retrieve, Weighted)


# ----------------------------------------------------------------------- pieces
def tokens_of(rows: Int[Tensor, " rows"], each: int) -> Int[Tensor, " tokens"]:
    """The places of these examples' tokens in the line of all, ``each`` to an example."""
    starts = rows[:, None] * each
    within = torch.arange(each, device=rows.device)
    return (starts + within).flatten()


def unit(features: Float[Tensor, "b h"]) -> Float[Tensor, "b h"]:
    """Features divided by their norm."""
    norms = features.norm(dim=-1, keepdim=True)
    return features / norms.clamp_min(_tiny(features))


def cosines(
    features: Float[Tensor, "b h"] | None, means: Float[Tensor, "n h"]
) -> Float[Tensor, "b n"]:
    """Each example's cosine with each term's mean feature."""
    assert features is not None  # the kernel provides them: needs_features
    return unit(features.to(means.dtype)) @ unit(means).T


def top(scores: Float[Tensor, "rows n"], count: int) -> Float[Tensor, "rows n"]:
    """1/k where a score is among the k = ``count`` largest of its row, else 0."""
    best = scores.topk(count, dim=-1).indices
    return torch.zeros_like(scores).scatter_(-1, best, 1 / count)


def densities(z: Float[Tensor, "b h"], extras: Mapping[str, Tensor]) -> Float[Tensor, "b n"]:
    """``(1/h) log N(z; μ_i, S_i)``: ``S_i`` has the eigenvalues ``signature.spread.i`` [q] along
    ``signature.axes.i`` [q, h], and ``signature.rest`` [n] along all others.
    """
    means, rest = extras["signature.mean"], extras["signature.rest"]
    z = z.to(means.dtype)
    columns = []
    for number, mean in enumerate(means):
        axes = extras[f"signature.axes.{number}"]
        spread = extras[f"signature.spread.{number}"]
        column = density(z, mean, axes, spread, rest[number])
        columns.append(column)
    return torch.stack(columns, -1)


def density(
    z: Float[Tensor, "b h"],
    mean: Float[Tensor, " h"],
    axes: Float[Tensor, "q h"],
    spread: Float[Tensor, " q"],
    rest: Float[Tensor, ""],
) -> Float[Tensor, " b"]:
    """The logarithm of a Gaussian's density for each number of a feature."""
    size = z.shape[-1]
    off = z - mean
    along = off @ axes.T
    squares = along.square()
    beside = (off.square().sum(-1) - squares.sum(-1)).clamp_min(0)
    distance = (squares / spread).sum(-1) + beside / rest
    further = size - len(spread)
    volume = spread.log().sum() + further * rest.log()
    each = (volume + distance) / size
    return -0.5 * (math.log(2 * math.pi) + each)


def remainders(
    total: int,
    odds: Sequence[float],
    caps: Sequence[int],
) -> list[int]:
    """``total`` dealt in proportion to the odds, by largest remainder, none above its cap; what a cap
    turns away is dealt among the others.
    """
    dealt = [0] * len(odds)
    left = min(total, sum(caps))
    while left:
        open_ = [i for i in range(len(odds)) if dealt[i] < caps[i]]
        whole = sum(odds[i] for i in open_)
        if whole > 0:
            quotas = {i: left * odds[i] / whole for i in open_}
        else:  # all that is left underflowed: alike
            quotas = {i: left / len(open_) for i in open_}
        given = {i: math.floor(quota) for i, quota in quotas.items()}
        behind = {i: given[i] - quotas[i] for i in open_}
        by_rest = sorted(open_, key=lambda i: (behind[i], i))
        over = left - sum(given.values())
        for i in by_rest[:over]:
            given[i] += 1
        for i, count in given.items():
            taken = min(count, caps[i] - dealt[i])
            dealt[i] += taken
            left -= taken
    return dealt


def drawn(
    total: int,
    odds: Sequence[float],
    caps: Sequence[int],
    seed: int,
    scores: Float[Tensor, " n"],
) -> list[int]:
    """``total`` draws by the odds, none above its cap; the draw is the example's, by its scores."""
    words = [f"{each:.6e}" for each in scores.tolist()]
    rng = numpy_rng(seed, "components", *words)
    dealt = [0] * len(odds)
    for _ in range(min(total, sum(caps))):
        room = [have < cap for have, cap in zip(dealt, caps, strict=True)]
        open_ = [each * free for each, free in zip(odds, room, strict=True)]
        if sum(open_) == 0:
            open_ = [float(free) for free in room]
        whole = sum(open_)
        shares = [each / whole for each in open_]
        place = int(rng.choice(len(odds), p=shares))
        dealt[place] += 1
    return dealt


@dataclass(frozen=True, eq=False)
class _Chosen:
    """A term with factors at a site, and the examples that chose it."""

    number: int  # of the term
    factors: Factors
    rows: Int[Tensor, " rows"]
    tokens: Int[Tensor, " tokens"]  # of these examples, in the line of all
    x: Float[Tensor, "tokens in"]

    def shared(
        self, inner: Float[Tensor, "tokens r"], weights: Float[Tensor, "b n"]
    ) -> Float[Tensor, "tokens r"]:
        """``inner`` times the term's weight for each example."""
        each = len(self.tokens) // len(self.rows)
        share = weights[self.rows, self.number].repeat_interleave(each)
        return inner * share[:, None]


def _chosen(at: Junction, choice: Choice) -> Iterator[_Chosen]:
    """The terms that are here and that some example chose."""
    line = at.x.flatten(0, -2)
    each = len(line) // len(choice.weights)
    for number, (factors, rows) in enumerate(zip(at.factors, choice.who, strict=True)):
        if factors is not None and len(rows):
            tokens = tokens_of(rows, each)
            yield _Chosen(number, factors, rows, tokens, line[tokens])


def _inner(own: _Chosen, choice: Choice) -> Float[Tensor, "tokens r"]:
    """``w A x`` of one term for its examples."""
    return own.shared(F.linear(own.x, own.factors.A), choice.weights)


def _mixture(at: Junction, choice: Choice) -> list[Weight]:
    """``Σ_i w_i v_i``, each term for the examples that chose it."""
    found: list[Weight] = [0.0] * len(choice.who)
    for own in _chosen(at, choice):
        inner = _inner(own, choice)
        found[own.number] = Inner(inner, own.tokens)
    return found


def _fusion(at: Junction, choice: Choice) -> list[Weight]:
    """``s (Σ_i w_i B_i)(Σ_j w_j A_j) x``: what goes up is the mean of what all came down to."""
    found: list[Weight] = [0.0] * len(choice.who)
    count = at.x.numel() // at.x.shape[-1]
    chosen = list(_chosen(at, choice))
    down: Tensor | None = None
    for own in chosen:
        inner = _inner(own, choice)
        if down is None:
            down = inner.new_zeros(count, inner.shape[-1])
        down = down.index_add(0, own.tokens, inner)
    if down is None:
        return found
    for own in chosen:
        inner = own.shared(down[own.tokens], choice.weights)
        found[own.number] = Inner(inner, own.tokens)
    return found


def _attended(
    inner: Float[Tensor, "N r"] | None,
    weights: Float[Tensor, " N"],
    allowed: Tensor,
) -> Weight:
    """A term's part for those of the N tokens that may attend to it, ``allowed`` [N]."""
    if inner is None:
        return 0.0
    tokens = allowed.nonzero().flatten()
    if not len(tokens):
        return 0.0
    shared = inner * weights[:, None]
    return Inner(shared[tokens], tokens)


def _choice(at: Junction) -> Choice:
    assert isinstance(at.choice, Choice)  # of ``choose``
    return at.choice


def _dtype(extras: Mapping[str, Tensor]) -> torch.dtype:
    """That of the tensors ``[any shape]``, which share one."""
    first = next(iter(extras.values()))
    return first.dtype


def _tiny(values: Float[Tensor, "*any"]) -> float:
    return torch.finfo(values.dtype).tiny
