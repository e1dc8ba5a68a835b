"""One adapter for classes that nobody trained, out of a pool of image classifiers, without data.

Source: LoRA Recycle, arXiv 2412.02220 (CVPR 2025). Each member gives images of its classes
(``inversion``); a meta-LoRA θ learns, episode by episode, to tell classes by the mean features of a
few images: ``p = softmax(−‖f_θ(x) − c_y‖²)``, toward the member's own answers where an episode is of one
member (KL), toward the classes where it is of several (cross-entropy). In use there is no step: the
class means of a user's few images are a head.

Ours: θ and the teachers are objects of their own (in the official code they share one, overwritten
each episode); the last θ is kept, not the one that is best on test classes. Not here: dropping image
patches (their step 2).

Shapes: n images, h features, w ways.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import cos, pi

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from fedgrove.adapters.adapter import Adapter, fresh
from fedgrove.adapters.assembly import Assembly, Term
from fedgrove.federation.tasks.base import Batch, Example
from fedgrove.ground.errors import AdapterError
from fedgrove.ground.seeds import generator, numpy_rng
from fedgrove.pools.inversion import Effort, Inverted, Statistics, image_shape, invert
from fedgrove.pools.pool import Pool
from fedgrove.training.kernel import Kernel
from fedgrove.training.live import LiveAssembly

META = "meta"


@dataclass(frozen=True)
class MetaTraining:
    """Episodes of meta-training: ``ways`` classes of ``shots`` images each, ``queries`` of each to be
    told apart; each second episode is of several members, where there are several.
    """

    episodes: int = 2000
    ways: int = 5
    shots: int = 1
    queries: int = 15
    rank: int = 4
    lr: float = 1e-3
    seed: int = 0


@dataclass(frozen=True, eq=False)
class Recycled:
    """θ, the images that it was learnt from, by member, and the loss of each episode."""

    adapter: Adapter
    images: Mapping[str, Inverted]
    losses: list[float]


@dataclass(frozen=True, eq=False)
class Episode:
    """Support and query images with their classes, 0 to w − 1, and what the query's teacher says:
    probabilities [n, w], of one member's episode.
    """

    support: Sequence[Example]
    support_labels: Int[Tensor, " s"]
    query: Sequence[Example]
    query_labels: Int[Tensor, " q"]
    taught: Float[Tensor, "q w"] | None


def recycle(
    pool: Pool,
    effort: Effort,
    course: MetaTraining,
    real: Statistics | None = None,
    advance: Callable[[str], None] = lambda _: None,
) -> Recycled:
    """``advance`` hears each member that gave its images, and the end. Raises ``FedgroveError`` for
    members that read no images, and for fewer classes or images than an episode takes.
    """
    image_shape(pool.kernel)
    classes = len(pool.card["labels"])
    if course.ways > classes:
        raise AdapterError(
            f"--ways {course.ways} is more than the members' {classes} classes; set it to {classes} or "
            "less."
        )
    if course.shots + 1 > effort.each:
        raise AdapterError(
            f"--each {effort.each} images of a class are too few for {course.shots} shots and a query; "
            f"set it to {course.shots + 1} or more."
        )
    images: dict[str, Inverted] = {}
    for name in pool.names:
        images[name] = invert(pool.kernel, pool.member(name).assembly, name, effort, real)
        advance(name)
    adapter, losses = learn(pool, {name: each.examples for name, each in images.items()}, course)
    advance(META)
    return Recycled(adapter, images, losses)


def learn(
    pool: Pool,
    images: Mapping[str, Sequence[Example]],
    course: MetaTraining,
) -> tuple[Adapter, list[float]]:
    """θ after all episodes, and their losses."""
    kernel = pool.kernel
    teachers = {
        name: kernel.logits(pool.member(name).assembly, own) for name, own in images.items()
    }
    sites = {name: kernel.base.sites[name] for each in pool.members for name in each.adapter}
    start = fresh(sites, course.rank, 2.0, generator(course.seed, "meta"))
    rng = numpy_rng(course.seed, "episodes")
    losses = []
    with kernel.opened(Assembly((Term(META, start),)), train=True) as live:
        optimiser = torch.optim.Adam(live.leaves, lr=course.lr)
        for number in range(course.episodes):
            for group in optimiser.param_groups:
                group["lr"] = course.lr * (1 + cos(pi * number / course.episodes)) / 2
            episode = drawn(images, teachers, course, rng, several=number % 2 == 1)
            loss = loss_of(kernel, live, episode)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(float(loss.detach()))
        return dict(live.trained().adapter(META)), losses


def drawn(
    images: Mapping[str, Sequence[Example]],
    teachers: Mapping[str, Float[Tensor, "n c"]],
    course: MetaTraining,
    rng: object,
    *,
    several: bool,
) -> Episode:
    """An episode: classes of one member, or each of a member of its own draw."""
    import numpy as np

    assert isinstance(rng, np.random.Generator)
    names = sorted(images)
    one = names[int(rng.integers(len(names)))]
    classes = sorted({int(each["label"]) for each in images[one]})
    chosen = [int(each) for each in rng.permutation(classes)[: course.ways]]
    several = several and len(names) > 1
    support: list[Example] = []
    query: list[Example] = []
    taught = []
    labels: tuple[list[int], list[int]] = ([], [])
    for way, label in enumerate(chosen):
        name = one
        if several:
            name = names[int(rng.integers(len(names)))]
        places = [i for i, each in enumerate(images[name]) if each["label"] == label]
        order = [places[int(i)] for i in rng.permutation(len(places))]
        few, asked = order[: course.shots], order[course.shots :][: course.queries]
        support += [images[name][i] for i in few]
        query += [images[name][i] for i in asked]
        labels[0].extend([way] * len(few))
        labels[1].extend([way] * len(asked))
        taught += [teachers[name][i, chosen] for i in asked]
    if several:
        answers = None
    else:
        answers = torch.stack(taught).softmax(-1)
    return Episode(
        support,
        torch.tensor(labels[0]),
        query,
        torch.tensor(labels[1]),
        answers,
    )


def loss_of(
    kernel: Kernel,
    live: LiveAssembly,
    episode: Episode,
) -> Float[Tensor, ""]:
    """``KL(teacher ‖ p)`` of one member's episode, cross-entropy of several's, the mean over queries."""
    whole = [*episode.support, *episode.query]
    plain = [{key: value for key, value in each.items() if key != "label"} for each in whole]
    batch: Batch = {
        key: value.to(kernel.base.device)
        for key, value in kernel.task.collate(plain, kernel.base.pad_id).items()
    }
    with kernel.hooked.running(batch, live):
        live.begin(len(whole), None)
        features = kernel.reader.features(batch)
    few, asked = features[: len(episode.support)], features[len(episode.support) :]
    logits = distances(few, episode.support_labels.to(few.device), asked)
    if episode.taught is None:
        return F.cross_entropy(logits, episode.query_labels.to(logits.device))
    taught = episode.taught.to(logits)
    return F.kl_div(logits.log_softmax(-1), taught, reduction="batchmean")


def distances(
    support: Float[Tensor, "s h"],
    labels: Int[Tensor, " s"],
    query: Float[Tensor, "q h"],
) -> Float[Tensor, "q w"]:
    """``−‖f − c_y‖²`` to each class's mean feature."""
    ways = int(labels.max()) + 1
    means = torch.stack([support[labels == way].mean(0) for way in range(ways)])
    return -(query[:, None] - means[None]).square().sum(-1)
