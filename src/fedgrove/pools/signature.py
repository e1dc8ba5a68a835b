"""What a member says of its data, for routers that choose by likeness: the mean, and on request the
covariance, of the untouched base's features on a few of its training examples.

It is made of data. Nothing makes one unless the owner asks (``fedgrove sign``, ``--signature``,
``--samples``), and noise can be added to the mean alone.

Shapes: m examples, h hidden size, q axes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from fedgrove.adapters.routers import density, unit
from fedgrove.adapters.tree import pack, typed, unpack
from fedgrove.federation.readers import Row
from fedgrove.ground.errors import AdapterError, DataError
from fedgrove.ground.files import write_bytes
from fedgrove.ground.seeds import numpy_rng
from fedgrove.interop.models import EMBEDDED_MODELS
from fedgrove.privacy import accountant, randomness
from fedgrove.privacy.gaussian import Grid
from fedgrove.training.kernel import Kernel

FILE = "signature.safetensors"  # beside the adapter that it is of
EXAMPLES = 20  # m
QUANTILE = 0.25  # of the leave-one-out scores: the threshold of Components
_LEAST = 1e-12  # a variance, where all examples are alike

Kind = Literal["mean", "gaussian"]


@dataclass(frozen=True, eq=False)
class Signature:
    """Of unit features z: ``mean`` [h]; of a gaussian also its covariance, with the eigenvalues
    ``spread`` [q] along ``axes`` [q, h] and ``rest`` along all others, and ``threshold``, the score
    (``density``) that a fourth of its own examples do not reach.
    """

    kind: Literal["mean", "gaussian"]
    base: str
    revision: str | None
    examples: int
    mean: Tensor
    axes: Tensor | None = None
    spread: Tensor | None = None
    rest: float | None = None
    threshold: float | None = None
    noise: float = 0.0  # standard deviations of noise, in units of the largest change of the sum
    epsilon: float | None = None
    delta: float | None = None

    def words(self) -> str:
        """What it is made of, and what it cost."""
        what = f"{self.kind} of {self.examples} examples"
        if not self.noise:
            return f"{what}, without noise"
        return f"{what}, epsilon = {self.epsilon:.3g} at delta = {self.delta:.2g}"


def sign(
    kernel: Kernel,
    rows: Sequence[Row],
    kind: Kind,
    *,
    base: str,
    revision: str | None,
    seed: int,
    noise: float = 0.0,
    whose: str,
) -> Signature:
    """The signature of at most ``EXAMPLES`` of these rows, drawn by the seed.

    ``noise``: of the mean, as a multiple of what replacing one example can change. Raises
    ``DataError`` for too few rows, ``AdapterError`` for noise on a covariance.
    """
    least = {"mean": 2, "gaussian": 3}[kind]
    if len(rows) < least:
        raise DataError(
            f"{whose} has {len(rows)} examples to make a signature of; a {kind} takes {least} or "
            "more."
        )
    if noise and kind != "mean":
        raise AdapterError(
            f"{whose}: noise is for a signature of the kind mean; a gaussian has none that it would "
            "survive."
        )
    order = numpy_rng(seed, "signature", whose).permutation(len(rows))
    chosen = [rows[int(index)] for index in sorted(order[:EXAMPLES])]
    examples = kernel.task.encode(chosen, kernel.base.processor)
    z = unit(kernel.features(examples).double())
    name = EMBEDDED_MODELS.get(base, base)
    if kind == "mean":
        mean, epsilon, delta = _noisy_mean(z, noise, len(rows))
        return Signature(
            kind,
            name,
            revision,
            len(z),
            mean,
            noise=noise,
            epsilon=epsilon,
            delta=delta,
        )
    mean, axes, spread, rest = gaussian(z)
    return Signature(
        kind,
        name,
        revision,
        len(z),
        mean,
        axes,
        spread,
        rest,
        threshold(z),
    )


def gaussian(
    z: Float[Tensor, "m h"],
) -> tuple[Float[Tensor, " h"], Float[Tensor, "q h"], Float[Tensor, " q"], float]:
    """(mean, axes, spread, rest) of the unbiased covariance S; where m ≤ h, and S is singular, shrunk
    towards ``tr(S)/h · I`` as far as OAS says (Chen, Wiesel, Eldar and Hero, IEEE TSP 2010).
    """
    count, size = z.shape
    mean = z.mean(0)
    _, values, axes = torch.linalg.svd((z - mean) / (count - 1) ** 0.5, full_matrices=False)
    kept = values > values.max() * 1e-10
    axes, spread = axes[kept], values[kept].square()
    level = max(float(spread.sum()) / size, _LEAST)
    if count > size:
        return mean, axes, spread, level
    share = oas(float(spread.sum()), float(spread.square().sum()), count, size)
    return mean, axes, (1 - share) * spread + share * level, share * level


def oas(
    trace: float,
    square: float,
    count: int,
    size: int,
) -> float:
    """How far a covariance of ``count`` examples with ``tr(S)`` and ``tr(S²)`` is shrunk."""
    over = (1 - 2 / size) * square + trace**2
    under = (count + 1 - 2 / size) * (square - trace**2 / size)
    if under <= 0:
        return 1.0
    return min(1.0, over / under)


def threshold(z: Float[Tensor, "m h"]) -> float:
    """The ``QUANTILE`` of the examples' scores, each under the signature of the others."""
    scores = []
    for left_out in range(len(z)):
        mean, axes, spread, rest = gaussian(torch.cat([z[:left_out], z[left_out + 1 :]]))
        own = density(
            z[left_out : left_out + 1],
            mean,
            axes,
            spread,
            torch.tensor(rest).to(z),
        )
        scores.append(own)
    return float(torch.cat(scores).quantile(QUANTILE))


def _noisy_mean(
    z: Float[Tensor, "m h"],
    noise: float,
    held: int,
) -> tuple[Float[Tensor, " h"], float | None, float | None]:
    """The mean of unit vectors, whose sum one other example changes by 2 at most, and (ε, δ), of one
    who holds so many examples.
    """
    if not noise:
        return z.mean(0), None, None
    randomness.require()
    delta = accountant.default_delta(held)
    epsilon = accountant.epsilon(noise, [(1.0, 1)], delta)
    grid = Grid.fine(2.0 * noise, 1.0)
    total = torch.stack([grid.cut(each) for each in z]).sum(0)
    return grid.noisy(total, randomness.fresh(), "signature") / len(z), epsilon, delta


# ------------------------------------------------------------------------- files
def save(folder: Path, signature: Signature) -> Path:
    """Beside the adapter."""
    path = folder / FILE
    write_bytes(path, pack(signature))
    return path


def read(folder: Path) -> Signature | None:
    """The signature beside an adapter; None where there is none. Raises ``AdapterError``."""
    path = folder / FILE
    if not path.exists():
        return None
    try:
        return typed(Signature, unpack(path.read_bytes()))
    except (AdapterError, OSError) as error:
        raise AdapterError(f"{path} cannot be read: {error}") from error
