"""Images out of an adapter: what a member and its head say that their classes look like.

Source: LoRA Recycle, arXiv 2412.02220 (CVPR 2025), step 1. ``X ~ N(0, 1)`` is stepped by Adam
(0.25; 0.5, 0.99) on ``CE(head(X), y) + 0.01 R + 10⁻³ TV(X)``, jittered and flipped, clamped to the
pixels' range, and the best step is kept. Theirs: R, the distance of batch-norm statistics of a
ResNet-50 that saw ImageNet. Ours: ``R = Σ_l ‖μ_l − μ̂_l‖ + ‖σ²_l − σ̂²_l‖`` of the inputs of the base's own
sites, against those of images that the user names; without any, none; and the total variation.

It is an attack, made a tool: whoever holds an adapter with its head can do this.

Shapes: n images, c channels, s rows, w columns, h features of a site's input.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from fedgrove.adapters.assembly import Assembly
from fedgrove.federation.tasks.base import Batch, Example
from fedgrove.federation.tasks.classify_images import Scaling
from fedgrove.ground.errors import RunError
from fedgrove.ground.seeds import generator
from fedgrove.training.kernel import Kernel
from fedgrove.training.live import LiveAssembly

Statistics = Mapping[str, tuple[Float[Tensor, " h"], Float[Tensor, " h"]]]  # mean, variance


@dataclass(frozen=True)
class Effort:
    """How images are made: per class, and the published settings of the optimiser."""

    each: int = 16
    steps: int = 2000
    lr: float = 0.25
    prior: float = 0.01  # of R
    smooth: float = 1e-3  # of the total variation
    seed: int = 0


@dataclass(frozen=True, eq=False)
class Inverted:
    """Images of one member as its task's examples, and the loss of the first and the kept step."""

    examples: list[Example]
    first: float
    best: float


def invert(
    kernel: Kernel,
    assembly: Assembly,
    name: str,
    effort: Effort,
    real: Statistics | None,
) -> Inverted:
    """``effort.each`` images of each class of a member. The member stays as it is."""
    task, base = kernel.task, kernel.base
    classes = len(task.labels)
    labels = torch.arange(classes).repeat_interleave(effort.each).to(base.device)
    draw = generator(effort.seed, "inversion", name)
    scaling = Scaling.of(base.processor)
    low = scaling(torch.full((3, 1, 1), 0)).to(base.device)
    high = scaling(torch.full((3, 1, 1), 255)).to(base.device)
    shape = image_shape(kernel)
    noise = torch.randn(len(labels), *shape, generator=draw)
    images = noise.to(base.device).requires_grad_()
    optimiser = torch.optim.Adam([images], lr=effort.lr, betas=(0.5, 0.99))
    best = float("inf")
    first = float("nan")
    kept = images.detach().clone()
    with kernel.opened(assembly.frozen(), train=False) as live:
        for step in range(effort.steps):
            seen = jittered(images, draw)
            loss = objective(kernel, live, seen, labels, real, effort)
            value = float(loss.detach())
            if step == 0:
                first = value
            if value < best:
                best = value
                kept = images.detach().clone()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            with torch.no_grad():
                images.copy_(images.clamp(low, high))
    pixels = kept.clamp(low, high).cpu()
    examples = _examples(pixels, labels.cpu(), scaling)
    return Inverted(examples, first, best)


def image_shape(kernel: Kernel) -> tuple[int, int, int]:
    """(c, s, w) of what the model reads. Raises ``RunError`` where it reads no images."""
    if kernel.task.reads != "images":
        raise RunError(
            "Only members that read images can be recycled: texts are no numbers that could be stepped."
        )
    from PIL import Image

    row = {"image": Image.new("RGB", (64, 64))}
    examples = kernel.task.encode([row], kernel.base.processor)
    c, s, w = examples[0]["pixels"].shape
    return int(c), int(s), int(w)


def jittered(images: Float[Tensor, "n c s w"], draw: torch.Generator) -> Float[Tensor, "n c s w"]:
    """Rolled by up to an eighth of a side, and flipped every other time."""
    reach = max(1, images.shape[-1] // 8)
    by = torch.randint(-reach, reach + 1, (2,), generator=draw).tolist()
    moved = torch.roll(images, shifts=by, dims=(2, 3))
    coin = torch.rand(1, generator=draw)
    if float(coin) < 0.5:
        return moved.flip(3)
    return moved


def objective(
    kernel: Kernel,
    live: LiveAssembly,
    images: Float[Tensor, "n c s w"],
    labels: Tensor,
    real: Statistics | None,
    effort: Effort,
) -> Float[Tensor, ""]:
    """How far images are from what a member takes for these labels, and from what images are."""
    batch: Batch = {"pixel_values": images, "labels": labels}
    found: dict[str, tuple[Tensor, Tensor]] = {}
    with watched(kernel, found, real is not None), kernel.hooked.running(batch, live):
        live.begin(len(images), None)
        logits = kernel.reader.answer(live, batch)
        loss = F.cross_entropy(logits, labels)
    if real is not None:
        loss = loss + effort.prior * distance(found, real)
    return loss + effort.smooth * variation(images)


def variation(images: Float[Tensor, "n c s w"]) -> Float[Tensor, ""]:
    """Squared differences of neighbouring pixels, summed over an image, the mean over images."""
    down = images[:, :, 1:] - images[:, :, :-1]
    across = images[:, :, :, 1:] - images[:, :, :, :-1]
    total = down.square().sum() + across.square().sum()
    return total / len(images)


def distance(found: Statistics, real: Statistics) -> Float[Tensor, ""]:
    """``Σ ‖μ − μ̂‖ + ‖σ² − σ̂²‖`` over sites."""
    parts = []
    for site, (mean, variance) in found.items():
        real_mean, real_variance = real[site]
        of_means = (mean - real_mean).norm()
        of_variances = (variance - real_variance).norm()
        parts.append(of_means + of_variances)
    return torch.stack(parts).sum()


@contextmanager
def watched(
    kernel: Kernel,
    found: dict[str, tuple[Tensor, Tensor]],
    wanted: bool = True,
) -> Iterator[None]:
    """Inside, a pass leaves the mean and the variance, [in] each, of a site's input over images and
    tokens.
    """

    def look(name: str, x: Float[Tensor, "*batch in"]) -> None:
        line = x.flatten(0, -2).to(kernel.base.adapter_dtype)
        found[name] = (line.mean(0), line.var(0, unbiased=False))

    hooks = []
    if wanted:
        for name in kernel.base.sites:
            module = kernel.base.model.get_submodule(name)
            hook = module.register_forward_pre_hook(
                lambda _, args, name=name: look(name, args[0]),
            )
            hooks.append(hook)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def statistics(kernel: Kernel, examples: Sequence[Example]) -> Statistics:
    """What public images look like at each site of the untouched base."""
    found: dict[str, tuple[Tensor, Tensor]] = {}
    plain = [{key: value for key, value in each.items() if key != "label"} for each in examples]
    batch = {
        key: value.to(kernel.base.device)
        for key, value in kernel.task.collate(plain, kernel.base.pad_id).items()
    }
    with watched(kernel, found), kernel.hooked.running(batch):
        kernel.reader.features(batch)
    return found


def _examples(
    images: Float[Tensor, "n c s w"],
    labels: Tensor,
    scaling: Scaling,
) -> list[Example]:
    """The images in 8 bits, as the task's examples."""
    pixels = (images * scaling.std + scaling.mean) / scaling.factor
    whole = pixels.round().clamp(0, 255).to(torch.uint8)
    return [
        {"pixels": each, "scaling": scaling, "label": int(label)}
        for each, label in zip(whole, labels, strict=True)
    ]
