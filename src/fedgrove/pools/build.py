"""From members to the assembly that runs them: a frozen term each, a router as their mix, and what
the router and the heads need as extras.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedgrove.adapters.adapter import Adapter, Factors, Site
from fedgrove.adapters.algebra import mean
from fedgrove.adapters.assembly import Assembly, Extra, Mix, Term, Weighted
from fedgrove.adapters.lowrank import product_svd
from fedgrove.adapters.routers import Arrow, Attention, Components, Compose, Even, Retrieve
from fedgrove.federation.tasks import TASKS
from fedgrove.ground.errors import AdapterError
from fedgrove.ground.options import Options
from fedgrove.ground.seeds import generator
from fedgrove.methods.head import PREFIX
from fedgrove.pools.members import PoolMember, matched
from fedgrove.pools.options import READS, ArrowOptions, AttentionOptions, ComponentsOptions
from fedgrove.training.readers import READERS

Head = Mapping[str, Tensor]


@dataclass(frozen=True)
class Recipe:
    """What was chosen for a pool."""

    router: str
    compose: Compose
    top_k: int
    options: Options


def assembly_of(
    members: Sequence[PoolMember],
    plan: Recipe,
    sites: Mapping[str, Site],
    fallback: Head,
) -> Assembly:
    """The pool. ``fallback``: the base's own head, of members that have none. Raises
    ``AdapterError`` where the members do not fit the plan.
    """
    check(members, plan)
    heads = heads_of(members, fallback)
    if plan.router == "uniform" and plan.compose != "ensemble":
        return uniform(members, heads, plan.compose)
    terms = tuple(Term(each.name, each.adapter, train="") for each in members)
    values = {**_signatures(members, plan), **_own(members, plan, sites)}
    apart = plan.compose == "ensemble"
    extras = _frozen(values) | _heads(heads, members, apart)
    if isinstance(plan.options, ComponentsOptions) and plan.options.components == "svd":
        terms = tuple(replace(term, adapter=triplets(term.adapter)) for term in terms)
    return Assembly(terms, _mix(plan, len(members)), extras)


def uniform(
    members: Sequence[PoolMember],
    heads: Sequence[Head],
    compose: Compose,
) -> Assembly:
    """All members alike, which one LoRA adapter computes: side by side, or the mean of the
    factors.
    """
    share = 1 / len(members)
    extras = head_extras(mean_head(heads))
    if compose == "fusion":
        whole = mean([each.adapter for each in members])
        return Assembly((Term("mean", whole, train=""),), Weighted({}), extras)
    terms = tuple(Term(each.name, each.adapter, train="") for each in members)
    shares = {each.name: share for each in members}
    return Assembly(terms, Weighted(shares), extras)


def alone(member: PoolMember, head: Head) -> Assembly:
    """One member as it is."""
    term = Term(member.name, member.adapter, train="")
    return Assembly((term,), extras=head_extras(head))


def head_extras(head: Head) -> dict[str, Extra]:
    """A head as every assembly has it."""
    return {PREFIX + name: Extra(value, train=False) for name, value in head.items()}


def heads_of(members: Sequence[PoolMember], fallback: Head) -> list[Head]:
    """Each member's head with its outputs in the order of the first one's labels; {} where the model
    writes.
    """
    labels = members[0].card["labels"]
    found: list[Head] = []
    for each in members:
        head = matched(each, labels) or fallback
        untrained = not head or each.card.get("head_trained") is False
        if untrained and READERS[each.card["head"]].has_head:
            raise AdapterError(
                f"{each.place.folder} has no head that was trained, so it names no classes; use one "
                "with its head (modules_to_save, head.safetensors)."
            )
        found.append(head)
    return found


def mean_head(heads: Sequence[Head]) -> Head:
    """The mean of the heads' tensors, in float64: what reads a state as the mean of all their logits
    does, where they are linear.
    """
    found: dict[str, Tensor] = {}
    for name in heads[0]:
        every = torch.stack([head[name].double() for head in heads])
        found[name] = every.mean(0)
    return found


def triplets(adapter: Adapter) -> Adapter:
    """The same update by its singular triplets: rows of A are the right vectors, columns of B the left
    ones times the singular values; the scale is 1.
    """
    found: Adapter = {}
    for site, factors in adapter.items():
        u, s, vh = product_svd([factors])
        columns = u * s
        found[site] = Factors(vh.contiguous(), columns.contiguous(), 1.0)
    return found


# ------------------------------------------------------------------------ checks
def check(members: Sequence[PoolMember], plan: Recipe) -> None:
    """Refuse what the plan cannot run."""
    count = len(members)
    if plan.top_k > count:
        raise AdapterError(
            f"--top-k {plan.top_k} is more than the pool's {count} members; set it to {count} or less."
        )
    if plan.compose == "fusion":
        _check_fusion(members)
    needs = READS[plan.router]
    if plan.router == "attention" and plan.top_k == count:
        needs = None
    if needs is None:
        return
    for each in members:
        if each.signature is None:
            raise AdapterError(
                f"{each.place.folder} has no signature, which --router {plan.router} reads: sign it "
                f"with --signature {needs}, fedgrove sign or --samples {each.name}=FILE, or take "
                "--router arrow, which needs none."
            )
        if needs == "gaussian" and each.signature.kind != "gaussian":
            raise AdapterError(
                f"{each.place.folder}: --router {plan.router} reads a signature of the kind gaussian, "
                f"and this one is a {each.signature.kind}; sign it again, or take --router retrieve."
            )


def _check_fusion(members: Sequence[PoolMember]) -> None:
    first = members[0]
    for other in members[1:]:
        for site in sorted(first.adapter.keys() | other.adapter.keys()):
            ours, theirs = first.adapter.get(site), other.adapter.get(site)
            if ours is None or theirs is None:
                what = "covers other layers"
            elif ours.rank != theirs.rank:
                what = f"has rank {theirs.rank}, not {ours.rank},"
            elif ours.scale != theirs.scale:
                what = f"has the scale {theirs.scale:g}, not {ours.scale:g},"
            else:
                continue
            raise AdapterError(
                f"{other.place.folder} {what} at '{site}' than {first.place.folder}; fusion takes "
                "equal ranks and scales: use --compose mixture."
            )


# ------------------------------------------------------------------------ pieces
def _mix(plan: Recipe, count: int) -> Mix:
    options = plan.options
    if plan.router == "uniform":
        return Even()
    if isinstance(options, ArrowOptions):
        return Arrow(plan.top_k, options.score)
    if isinstance(options, AttentionOptions):
        return Attention(plan.top_k, retrieves=plan.top_k < count)
    if isinstance(options, ComponentsOptions):
        return Components(plan.top_k, **options.model_dump())
    return Retrieve(plan.top_k, plan.compose)


def _signatures(members: Sequence[PoolMember], plan: Recipe) -> dict[str, Tensor]:
    """What the router reads of the n members' signatures, in float64: means [n, h], and for each
    member its axes [q, h] and spread [q]; rests, thresholds and ranks, [n] each.
    """
    signed = [each.signature for each in members]
    kind = READS[plan.router]
    if kind is None or any(each is None for each in signed):
        return {}
    means = [each.mean for each in signed if each]
    found = {"signature.mean": torch.stack(means)}
    if kind == "mean":
        return found
    for number, each in enumerate(signed):
        assert each is not None
        assert each.axes is not None
        assert each.spread is not None
        found[f"signature.axes.{number}"] = each.axes
        found[f"signature.spread.{number}"] = each.spread
    numbers = [(each.rest or 0.0, each.threshold or 0.0) for each in signed if each]
    rest, limits = torch.tensor(numbers, dtype=torch.float64).T
    ranks = torch.tensor([each.rank for each in members], dtype=torch.float64)
    return found | {
        "signature.rest": rest.contiguous(),
        "signature.threshold": limits.contiguous(),
        "signature.rank": ranks,
    }


def _own(
    members: Sequence[PoolMember],
    plan: Recipe,
    sites: Mapping[str, Site],
) -> dict[str, Tensor]:
    """What the router has at each site: prototypes [n, in] of n members, or its own factors A
    [width, in] and B [out, width].
    """
    options = plan.options
    found: dict[str, Tensor] = {}
    covered: set[str] = set()
    for member in members:
        covered.update(member.adapter)
    for name in sorted(sites):
        if name not in covered:
            continue
        site = sites[name]
        if isinstance(options, ArrowOptions):
            rows = [_prototype(member.adapter.get(name), site) for member in members]
            found[f"prototypes.{name}"] = torch.stack(rows)
        if isinstance(options, AttentionOptions):
            draw = generator(options.seed, "router", name)
            bound = site.in_features**-0.5
            down = torch.rand(options.width, site.in_features, generator=draw)
            up = torch.randn(site.out_features, options.width, generator=draw)
            found[f"router.A.{name}"] = (2 * down - 1) * bound
            found[f"router.B.{name}"] = 0.01 * up
    return found


def _prototype(factors: Factors | None, site: Site) -> Tensor:
    """[in]: the first right singular vector of ``B A``; zero where there is none."""
    if factors is None:
        return torch.zeros(site.in_features)
    _, _, vh = product_svd([factors], rank=1)
    return vh[0].to(factors.A.dtype)


def _heads(
    heads: Sequence[Head],
    members: Sequence[PoolMember],
    apart: bool,
) -> dict[str, Extra]:
    """A head for each member; one for all where they have the same, or where the model writes."""
    kind = TASKS.find(members[0].card["task"]).kind
    if apart and kind != "class":
        raise AdapterError(
            "--compose ensemble averages the probabilities of one class of several; this task adds up "
            "by mixture or fusion."
        )
    if not READERS[members[0].card["head"]].has_head:
        return {}
    if not apart and all(_equal(head, heads[0]) for head in heads):
        return head_extras(heads[0])
    if members[0].card["head"] == "stock" and not apart:
        raise AdapterError(
            "The members have heads of their own inside the base's classifier, which take no mixed "
            "states: use --compose ensemble (of --router retrieve or uniform)."
        )
    found: dict[str, Extra] = {}
    for number, head in enumerate(heads):
        for name, value in head.items():
            found[f"heads.{number}.{name}"] = Extra(value, train=False)
    return found


def _equal(one: Head, other: Head) -> bool:
    return all(torch.equal(one[name], other[name]) for name in other)


def _frozen(values: Mapping[str, Tensor]) -> dict[str, Extra]:
    """Tensors [any shape] that do not train."""
    return {name: Extra(value, train=False) for name, value in values.items()}
