"""The fields of the study: jobs on which the mechanisms can show, and what is run on each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from study import domains, planted
from study.planted import Planted

BENCHMARKS = Path(__file__).resolve().parent.parent
JOBS = BENCHMARKS.parent / "jobs"
HILORA = 'hilora[basis="B - B_start"]'
#: what every field is measured against
ANCHORS = ("base", "local", "fedit", "oracle", "pooled")
#: the three systems, the product rule for mixed ranks, and what composes the three
SYSTEMS = ("fedtreelora", HILORA, "grove")
#: FedTreeLoRA's three suspects (issue of the study): what it deploys, the warm-up, the distances
SUSPECTS = (
    "fedtreelora[external_update=previous]",
    "fedtreelora[external_damping=0.5]",
    "fedtreelora[external_update=previous, external_damping=0.5]",
    "fedtreelora[external=false]",
    "fedtreelora[warmup_rounds=1]",
    "fedtreelora[fixed_k=4]",
    "fedtreelora[distance=cosine]",
    "fedtreelora[lambda_lr=100.0]",
    "fedtreelora[tree=false]",
)
TIERS = (
    'hilora[basis="B - B_start", fractions=[1,0,0]]',
    'hilora[basis="B - B_start", fractions=[0.4,0.6,0]]',
    "hilora",
)


#: parts of grove left out or replaced, for the planted tree (``oracle.Regrouped``)
SAME_GROUPS = "grove-regrouped"
TRUE_GROUPS = "grove-regrouped[counts=[1,2,4]]"
GROVES = (
    "grove[root_share=1.0]",
    SAME_GROUPS,
    TRUE_GROUPS,
    "grove[leaf_rounds=2]",
    "grove[together=false]",
)
BUDGETS = ("fed-plora", "flexlora")


@dataclass(frozen=True)
class Source:
    """Data (and a model) that a script makes: ``make(folder, seed)`` fills a folder."""

    make: Callable[[Path, int], None]
    version: str  # changes with what is made
    settings: tuple[str, ...]  # with {folder}


@dataclass(frozen=True)
class Field:
    """A job and what is run on it.

    ``metric``: the measure of the claims, ``higher``: whether more of it is better. ``guess``: CPU
    seconds of a run on one thread, until runs were timed.
    """

    name: str
    title: str
    differs: str
    file: Path
    metric: str
    higher: bool
    methods: tuple[str, ...]
    full: str  # the job of the papers' size
    changes: tuple[str, ...] = ()
    source: Source | None = None
    planted: Planted | None = None
    guess: float = 200.0
    rates: tuple[float, ...] = (1e-3, 2e-3, 4e-3)
    quick: tuple[str, ...] = ()  # further settings of --quick; () leaves the field out of it
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)

    def settings(self, folder: Path) -> list[str]:
        """What the job needs to find what the source made."""
        if self.source is None:
            return []
        return [text.format(folder=folder) for text in self.source.settings]


def _planted(
    name: str,
    title: str,
    differs: str,
    made: Planted,
    *changes: str,
    more: Sequence[str] = (),
) -> Field:
    return Field(
        name=name,
        title=title,
        differs=differs,
        file=BENCHMARKS / "study" / "planted.toml",
        metric="loss",
        higher=False,
        # no pooled: the true groups are the ceiling, and a pooled run is a whole one
        methods=(*ANCHORS[:4], *SYSTEMS, *more),
        full="",
        changes=changes,
        source=Source(
            make=lambda folder, seed: planted.make(made, folder, seed),
            version=str(planted.fingerprint(made)),
            settings=("model.name={folder}/model", "data.path={folder}/silos"),
        ),
        planted=made,
        guess=4.0,
        rates=(1e-2, 2e-2, 4e-2),
        quick=("run.rounds=6",),
    )


_DRAWINGS = (
    ("gl", "GL-Dir(0.3): a Dirichlet over 100 classes of drawings"),
    ("sc", "SC-Dir(0.3): a Dirichlet over 20 super-classes"),
    ("patho", "Patho(10): ten of 100 classes each"),
)


def _images(split: str, about: str, head: str) -> Field:
    return Field(
        name=f"images-{split}-{head}",
        title=f"drawings, {about}; head {head}",
        differs=about,
        file=JOBS / f"hilora-quickdraw-{split}-small.toml",
        metric="accuracy",
        higher=True,
        # clients have no true groups here, so no oracle: training alone stands for it
        methods=("base", "local", "fedit", "pooled", "hilora", HILORA, "grove"),
        full=f"hilora-cifar100-{split}.toml",
        changes=(f"federation.head={head}", "run.eval_every=5"),
        guess=220.0,
    )


FIELDS: dict[str, Field] = {
    each.name: each
    for each in (
        _planted(
            "planted",
            "planted tree",
            "what is to be learnt: one change in the first layer, two in the second, four in the third",
            Planted(),
            more=("fed-plora", "flexlora", *GROVES),
        ),
        _planted(
            "planted-one",
            "planted, all alike",
            "nothing: one change in every layer",
            Planted(counts=(1, 1, 1), members=16),
        ),
        _planted(
            "planted-own",
            "planted, each its own",
            "what is to be learnt: one change in the first layer, four in the second, one for each "
            "client in the third",
            Planted(counts=(1, 4, 16), members=1),
            more=("grove[leaf_rounds=2]",),
        ),
        _planted(
            "planted-budgets",
            "planted tree, budgets from 1 to 8",
            "the planted tree, and ranks",
            Planted(),
            "federation.ranks=[1,2,4,8]",
            more=BUDGETS,
        ),
        Field(
            name="generation",
            title="generation, tasks of several families",
            differs="task (four, of three data sets)",
            file=JOBS / "evidence-generation-small.toml",
            metric="loss",
            higher=False,
            methods=(*ANCHORS, *SYSTEMS, *SUSPECTS, *TIERS),
            full="fedtreelora-flan-llama2-7b.toml",
            quick=("run.rounds=3", "train.local_steps=3", "data.test_examples=8"),
        ),
        Field(
            name="generation-family",
            title="generation, tasks of one family",
            differs="task (four, of one data set)",
            file=JOBS / "evidence-generation-family-small.toml",
            metric="loss",
            higher=False,
            methods=(*ANCHORS, *SYSTEMS, SUSPECTS[0], SUSPECTS[5]),
            full="fedtreelora-flan-llama2-7b.toml",
        ),
        Field(
            name="conventions",
            title="generation, what is wanted unsaid",
            differs="kind of question asked about a sentence (four, of one data set), not in the prompt",
            file=JOBS / "evidence-conventions-small.toml",
            metric="loss",
            higher=False,
            methods=(*ANCHORS[:4], *SYSTEMS),
            full="fedtreelora-flan-llama2-7b.toml",
            guess=180.0,
        ),
        *(
            Field(
                name=name,
                title=f"generation, ranks 1 to 16, {about}",
                differs=f"task, amount of data, rank ({about})",
                file=JOBS / "evidence-resources-small.toml",
                metric="loss",
                higher=False,
                methods=(
                    "base",
                    "local",
                    "fedit[uniform_rank=min]",
                    "fedit[uniform_rank=max]",
                    "oracle[uniform_rank=max]",
                    "fed-plora",
                    "flexlora",
                    "hetlora",
                    "flora",
                    "grove",
                ),
                full="ranks-glue-roberta-large.toml",
                changes=changes,
            )
            for name, about, changes in (
                ("resources", "more data, larger rank", ()),
                ("resources-turned", "more data, smaller rank", ("federation.ranks=[16,8,4,1]",)),
                (
                    "resources-even",
                    "rank apart from data",
                    ("federation.ranks=[1,4,8,16,16,1,4,8,8,16,1,4,4,8,16,1]",),
                ),
            )
        ),
        Field(
            name="understanding",
            title="understanding, base-size encoder",
            differs="task (four, of two kinds)",
            file=BENCHMARKS / "study" / "understanding.toml",
            metric="accuracy",
            higher=True,
            methods=(*ANCHORS, *SYSTEMS, SUSPECTS[0], SUSPECTS[5]),
            full="fedtreelora-glue-roberta-large.toml",
            guess=5400.0,
            rates=(5e-4, 1e-3, 2e-3),
        ),
        Field(
            name="domains",
            title="six classes in six looks, shared head",
            differs="look: photo, negative, edges, turned, drawing, chalk",
            file=BENCHMARKS / "study" / "domains.toml",
            metric="accuracy",
            higher=True,
            methods=(*ANCHORS, *SYSTEMS, TIERS[0], TIERS[1]),
            full="hilora-domainnet.toml",
            source=Source(
                make=domains.make,
                version="1",
                settings=("data.path={folder}/silos",),
            ),
            guess=90.0,
            quick=("run.rounds=3",),
        ),
        *(
            _images(split, about, head)
            for head in ("shared", "local")
            for split, about in _DRAWINGS
        ),
    )
}
