"""The claims of the three papers and of grove, each with the field where it should show and the
ablation that isolates its mechanism.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from study.fields import HILORA, SAME_GROUPS, SUSPECTS, TIERS, TRUE_GROUPS

Part = Literal["mean", "tail"]


@dataclass(frozen=True)
class Claim:
    """``better`` ahead of ``worse`` on a field, in the mean over clients or in the tail.

    ``isolates``: the mechanism that is all that the two differ by, or what it is beside.
    """

    text: str
    paper: str
    field: str
    better: str
    worse: str
    isolates: str
    part: Part = "mean"


_TREE, _TIERS, _RANKS = "FedTreeLoRA", "HiLoRA", "Fed-PLoRA"
_ROOT, _ROOT_CLUSTER, _PLAIN = TIERS
_NO_BRANCH, _CASCADE, _LEAF = (
    "grove[root_share=1.0]",
    "grove[together=false]",
    "grove[leaf_rounds=2]",
)


def _systems(paper: str, method: str, field: str) -> list[Claim]:
    return [
        Claim(
            f"{method.partition('[')[0]} is ahead of FedIT", paper, field, method, "fedit", "all"
        ),
        Claim("… and its worst clients", paper, field, method, "fedit", "all", "tail"),
        Claim("… of training alone", paper, field, method, "local", "taking part"),
    ]


CLAIMS: list[Claim] = [
    *(
        claim
        for field in ("generation", "generation-family", "conventions", "understanding", "planted")
        for claim in _systems(_TREE, "fedtreelora", field)
    ),
    Claim(
        "what depth adds: cuts by layer are ahead of four groups in all layers",
        _TREE,
        "generation",
        "fedtreelora",
        "fedtreelora[fixed_k=4]",
        "layer-wise depth",
    ),
    Claim(
        "… where tasks are of one family",
        _TREE,
        "generation-family",
        "fedtreelora",
        "fedtreelora[fixed_k=4]",
        "layer-wise depth",
    ),
    Claim(
        "one tree for all layers is ahead of clustering each layer alone",
        _TREE,
        "generation",
        "fedtreelora",
        "fedtreelora[tree=false]",
        "nesting",
    ),
    Claim(
        "the external expert helps",
        _TREE,
        "generation",
        "fedtreelora",
        "fedtreelora[external=false]",
        "external expert",
    ),
    Claim(
        "deploying what was trained is ahead of deploying the renewed external",
        "ours",
        "generation",
        SUSPECTS[0],
        "fedtreelora",
        "suspect (a): deployed with the external trained against",
    ),
    Claim(
        "damping the external expert is ahead of renewing it at once",
        "ours",
        "generation",
        SUSPECTS[1],
        "fedtreelora",
        "suspect (a): half-way",
    ),
    Claim(
        "both together",
        "ours",
        "generation",
        SUSPECTS[2],
        "fedtreelora",
        "suspect (a): both repairs",
    ),
    Claim(
        "one round of warm-up is ahead of three",
        "ours",
        "generation",
        "fedtreelora[warmup_rounds=1]",
        "fedtreelora",
        "suspect (b)",
    ),
    Claim(
        "a faster λ is ahead",
        "ours",
        "generation",
        "fedtreelora[lambda_lr=100.0]",
        "fedtreelora",
        "suspect (c): λ",
    ),
    Claim(
        "cosine distances are ahead of Frobenius",
        "ours",
        "generation",
        "fedtreelora[distance=cosine]",
        "fedtreelora",
        "suspect (c): distances",
    ),
    *(
        claim
        for field in (
            "generation",
            "generation-family",
            "conventions",
            "domains",
            "understanding",
            "planted",
        )
        for claim in _systems(_TIERS, HILORA, field)
    ),
    *(
        claim
        for split in ("gl", "sc", "patho")
        for claim in _systems(_TIERS, HILORA, f"images-{split}-shared")
    ),
    Claim(
        "the cluster tier adds to the root",
        _TIERS,
        "generation",
        _ROOT_CLUSTER,
        _ROOT,
        "cluster tier, at equal rounds",
    ),
    Claim(
        "the leaf tier adds to root and clusters",
        _TIERS,
        "generation",
        HILORA,
        _ROOT_CLUSTER,
        "leaf tier, at equal rounds",
    ),
    Claim(
        "clusters of B − B_start are ahead of clusters of B",
        "ours",
        "generation",
        HILORA,
        _PLAIN,
        "what is clustered",
    ),
    *(
        Claim(text, _RANKS, field, "fed-plora", other, isolates, part)
        for field in ("resources", "resources-turned", "resources-even")
        for text, other, isolates, part in (
            ("Fed-PLoRA is ahead of FlexLoRA", "flexlora", "fold against truncated SVD", "mean"),
            ("… of HETLoRA", "hetlora", "fold against truncation", "mean"),
            ("… of FLoRA", "flora", "fold against stacking", "mean"),
            ("… of FedIT at the smallest rank", "fedit[uniform_rank=min]", "mixed ranks", "mean"),
            ("… and its worst clients", "fedit[uniform_rank=min]", "mixed ranks", "tail"),
            ("… and not behind FedIT at the largest", "fedit[uniform_rank=max]", "budget", "mean"),
        )
    ),
    *(
        Claim(text, "grove", field, better, worse, isolates)
        for text, field, better, worse, isolates in (
            ("branches add to the root", "planted", "grove", _NO_BRANCH, "branches"),
            (
                "groups by layer are ahead of the deepest groups in all layers",
                "planted",
                "grove",
                SAME_GROUPS,
                "layer-wise depth",
            ),
            ("the true groups are not ahead", "planted", "grove", TRUE_GROUPS, "the growth"),
            ("both at once is ahead of a cascade", "planted", "grove", _CASCADE, "together"),
            ("a leaf pays", "planted", _LEAF, "grove", "leaf and gate"),
            ("a leaf pays where each is its own", "planted-own", _LEAF, "grove", "leaf and gate"),
        )
    ),
    *(
        Claim(text, "grove", field, "grove", other, "all", part)
        for field, rivals in (
            ("planted", ("fedit", "fedtreelora", HILORA, "fed-plora", "flexlora", "local")),
            ("planted-one", ("fedit",)),
            ("planted-own", ("fedit", "fedtreelora", HILORA, "local")),
            ("planted-budgets", ("fed-plora", "flexlora", "fedtreelora", HILORA, "local")),
            ("generation", ("fedit", "fedtreelora", HILORA, "local")),
            ("generation-family", ("fedit", "fedtreelora", HILORA, "local")),
            ("conventions", ("fedit", "oracle", "fedtreelora", HILORA, "local")),
            ("resources-even", ("fed-plora", "flexlora", "local")),
            ("domains", ("fedit", "fedtreelora", HILORA, "local")),
        )
        for other in rivals
        for text, part in (
            (f"grove is ahead of {other.partition('[')[0]}", "mean"),
            ("… in the tail", "tail"),
        )
    ),
]
