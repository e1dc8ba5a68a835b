"""The servers and a party of columns in float64, against autograd on one model of all columns."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fedgrove.adapters.private import PrivacyError, unseal
from fedgrove.adapters.tree import pack
from fedgrove.vertical.messages import Answer, Message, Traffic, carried_up
from fedgrove.vertical.party import Columns, Effort, loss
from fedgrove.vertical.server import Split, Vim, VimJ

EFFORT = Effort(steps=1, lr=0.3, head_lr=0.2, decay=0.01, rho=0.6)
N, C = 24, 3


def parties(
    own: bool = False, effort: Effort = EFFORT, width: int = 4
) -> tuple[list[Columns], Tensor]:
    draw = torch.Generator().manual_seed(2)
    labels = torch.randint(C, (N,), generator=draw)
    found = []
    for name in ("one", "two"):
        x = torch.randn(N, 3, generator=draw, dtype=torch.float64) + labels[:, None]
        found.append(
            Columns(
                name,
                effort,
                x,
                range(N),
                width=width,
                classes=C if own else None,
                generator=draw,
                dtype=torch.float64,
            )
        )
    return found, labels


def plain(sealed: Tensor | None) -> Tensor:
    assert sealed is not None
    return unseal(sealed)


def total(shares: Iterable[Tensor]) -> Tensor:
    return torch.stack(list(shares)).sum(0)


def widths(found: list[Columns]) -> dict[str, int]:
    return {party.name: party.width for party in found}


def play(server: Split | Vim, found: list[Columns], rows: range) -> dict[str, Answer]:
    messages = {party.name: party.speak(rows) for party in found}
    answers = server.answers(rows, messages)
    for party in found:
        party.fit(rows, answers[party.name])
    return answers


def test_split_learning_is_sgd_on_one_model_of_all_columns() -> None:
    found, labels = parties()
    server = Split(labels, C, widths(found), EFFORT)
    inner = [plain(party.inner).clone() for party in found]
    outer = [torch.zeros(4, C, dtype=torch.float64) for _ in found]
    for start in (0, 8, 16, 0, 8):
        rows = range(start, start + 8)
        leaves = [leaf.clone().requires_grad_() for leaf in (*inner, *outer)]
        x = [party.x[list(rows)] for party in found]
        logits = total(
            torch.relu(own @ V) @ W for own, V, W in zip(x, leaves[:2], leaves[2:], strict=True)
        )
        slopes = torch.autograd.grad(F.cross_entropy(logits, labels[list(rows)]), leaves)
        rates = [EFFORT.lr] * 2 + [EFFORT.head_lr] * 2
        moved = [
            (leaf - rate * (slope + EFFORT.decay * leaf)).detach()
            for leaf, rate, slope in zip(leaves, rates, slopes, strict=True)
        ]
        inner, outer = moved[:2], moved[2:]
        play(server, found, rows)
    for party, V, W in zip(found, inner, outer, strict=True):
        assert torch.allclose(plain(party.inner), V, atol=1e-13)
        assert torch.allclose(server.weights[party.name], W, atol=1e-13)


def test_vim_moves_as_the_formulas_say() -> None:
    found, labels = parties()
    server = Vim(labels, C, widths(found), EFFORT)
    rows = range(8)
    for _ in range(3):
        h = [party.embed(rows) for party in found]
        W = [server.weights[party.name] for party in found]
        V = [plain(party.inner) for party in found]
        old = server.duals[:8].clone()
        sums = total(a @ b for a, b in zip(h, W, strict=True))
        play(server, found, rows)
        new = server.duals[:8]
        # z from the multipliers, which are softmax(z) - y up to a constant of each row
        z = sums - (new - old) / EFFORT.rho
        assert torch.allclose(new, z.softmax(-1) - F.one_hot(labels[:8], C), atol=1e-9)
        for place, party in enumerate(found):
            slope = h[place].T @ (2 * new - old) / 8
            expected = W[place] - EFFORT.head_lr * (slope + EFFORT.decay * W[place])
            assert torch.allclose(server.weights[party.name], expected, atol=1e-12)
            leaf = V[place].clone().requires_grad_()
            share = torch.relu(party.x[:8] @ leaf) @ expected
            rest = sums - h[place] @ W[place] - z
            each = (new * share).sum(-1) + EFFORT.rho / 2 * (rest + share).square().sum(-1)
            (slope,) = torch.autograd.grad(each.mean(), leaf)
            moved = leaf - EFFORT.lr * (slope + EFFORT.decay * leaf)
            assert torch.allclose(plain(party.inner), moved, atol=1e-12)
        assert float(server.duals[8:].abs().max()) == 0


def test_vim_j_trains_the_weights_at_the_party() -> None:
    effort = replace(EFFORT, steps=4, damp=0.6)
    found, labels = parties(own=True, effort=effort)
    server = VimJ(labels, C, widths(found), effort)
    assert server.weights == {}
    rows = range(8)
    play(server, found, rows)  # moves W off zero
    party = found[0]
    answer = Answer(torch.randn(8, C).double(), torch.randn(8, C).double())
    leaves = [plain(leaf).clone().requires_grad_() for leaf in (party.inner, party.weight)]
    optimizer = torch.optim.SGD(
        [
            {"params": [leaves[0]], "lr": effort.lr},
            {"params": [leaves[1]], "lr": effort.head_lr},
        ],
        weight_decay=effort.decay,
    )
    first = party.speak(rows).rows
    for _ in range(effort.steps):
        share = torch.relu(party.x[:8] @ leaves[0]) @ leaves[1]
        optimizer.zero_grad()
        loss(share, first, answer, effort).backward()
        optimizer.step()
    party.fit(rows, answer)
    assert torch.allclose(plain(party.inner), leaves[0], atol=1e-13)
    assert torch.allclose(plain(party.weight), leaves[1], atol=1e-13)
    assert party.norm() == pytest.approx(float(leaves[1].detach().norm()))


def test_linear_parties_need_no_embedding() -> None:
    found, labels = parties(own=True, width=0)
    server = VimJ(labels, C, widths(found), EFFORT)
    for _ in range(30):
        play(server, found, range(N))
    sums = total(party.speak(range(N)).rows for party in found)
    assert float(F.cross_entropy(sums, labels)) < 0.8 * float(torch.tensor(float(C)).log())


def test_what_a_party_trains_cannot_be_sent() -> None:
    found, _ = parties(own=True)
    with pytest.raises(PrivacyError):
        pack(found[0].store())
    assert pack(found[0].store(), private=True)
    assert found[0].weight is not None
    sealed = Message(found[0].weight)
    with pytest.raises(PrivacyError):
        carried_up(sealed, Traffic())
    assert carried_up(found[0].speak(range(2)), Traffic()).rows.shape == (2, C)
