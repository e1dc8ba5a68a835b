"""How much privacy a run has spent: (ε, δ) by Rényi accounting, with Google's ``dp-accounting``.

A step adds Gaussian noise of ``noise`` times the largest norm that one member (a client, an
example) can add to a sum, in which each member takes part by its own coin of probability ``rate``
(Poisson sampling). Neighbours differ by adding or removing one member.

The noise is the discrete Gaussian (``fedgrove.privacy.gaussian``), and the orders are such that the
continuous one's figures hold for it. Without sampling its Rényi divergence of order α is at most
α / 2z² (Canonne, Kamath and Steinke 2020, theorem 14). With sampling the orders are whole numbers:
there the moment of a mixture is a sum over powers of that of the noise alone, and the continuous
one's are the largest that the bound allows; the other direction is the smaller one for any noise
that is symmetric (Mironov, Talwar and Zhang 2019, theorem 5).
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence

from fedgrove.ground.errors import FedgroveError

_WHOLE = [*range(2, 65), 72, 80, 96, 128, 192, 256, 512, 1024]
_ALSO = [1.1, 1.25, 1.5, 1.75, 2.5]  # without sampling; with it their series converge badly


class AccountantMissing(FedgroveError):
    """The ``privacy`` extra is not installed."""


def require() -> None:
    """Raises ``AccountantMissing`` where the accountant is not installed."""
    if importlib.util.find_spec("dp_accounting") is None:
        raise AccountantMissing(
            "Noise in [privacy] needs the package dp-accounting; install it with pip install "
            '"fedgrove[privacy]".'
        )


def epsilon(
    noise: float,
    spent: Sequence[tuple[float, int]],
    delta: float,
) -> float | None:
    """ε at ``delta`` after ``spent`` = [(rate, steps) ...]; None where there is none (no noise); 0
    without a step.
    """
    spent = [(rate, steps) for rate, steps in spent if steps]
    if not spent:
        return 0.0
    if noise <= 0:
        return None
    require()
    from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent, rdp

    orders = _WHOLE
    if all(rate >= 1 for rate, _ in spent):
        orders = sorted([*_ALSO, *_WHOLE])
    accountant = rdp.RdpAccountant(orders)
    for rate, steps in spent:
        step = GaussianDpEvent(noise)
        if rate < 1:
            step = PoissonSampledDpEvent(rate, step)
        accountant.compose(step, steps)
    found = float(accountant.get_epsilon(delta))
    if math.isfinite(found):
        return found
    return None


def default_delta(members: int) -> float:
    """``1 / N^1.1``; at most one half, for a single member."""
    return min(0.5, members**-1.1)
