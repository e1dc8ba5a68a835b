"""What compression loses and saves, what it refuses, and that a run with it is accounted and
resumed as any other.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.stops import StopAfter
from tests.test_run import adapters, lines, summary
from tests.tiny import tiny_job

from fedgrove.adapters.adapter import Factors
from fedgrove.adapters.private import PrivacyError, seal
from fedgrove.adapters.tree import nbytes, numbers, pack, unpack
from fedgrove.ground.errors import AdapterError
from fedgrove.start import run
from fedgrove.wire.compress import expand, passed, sent_bytes, squeeze


def content(rank: int = 8, out: int = 96, inner: int = 384) -> dict[str, Any]:
    draw = torch.Generator().manual_seed(5)
    return {
        "adapter": {
            f"layer.{n}": Factors(
                torch.randn(rank, inner, generator=draw) * 10.0 ** (n - 3),
                torch.randn(out, rank, generator=draw),
                2.0,
            )
            for n in range(4)
        },
        "indices": [0, 3],
        "scores": torch.randn(7, generator=draw),
        "count": torch.tensor(3),
        "note": "root",
    }


def test_none_is_the_very_same_tree() -> None:
    tree = content()
    assert squeeze(tree, "none") is tree
    assert passed(tree, "none") is tree


@pytest.mark.parametrize("how", ["fp16", "int8"])
def test_what_arrives_has_every_name_shape_and_plain_value_and_a_bounded_error(how: Any) -> None:
    tree = content()
    back = expand(unpack(pack(squeeze(tree, how))))  # through the real encoding
    assert back["indices"] == [0, 3]
    assert back["note"] == "root"
    assert back["count"] == 3
    assert list(back["adapter"]) == list(tree["adapter"])
    for site, before in tree["adapter"].items():
        after = back["adapter"][site]
        assert after.scale == before.scale
        for old, new, axis in ((before.A, after.A, 1), (before.B, after.B, 0)):
            assert new.dtype == old.dtype
            assert new.shape == old.shape
            error = (new - old).abs()
            assert error.max() > 0, "nothing was rounded, so the bound says nothing"
            if how == "fp16":
                assert (error <= old.abs() * 2.0**-11 + 2.0**-25).all()
            # half a step of the row's (a rank index's) own scale, which bfloat16 rounds by at most
            # 2^-9
            else:
                assert (
                    error <= old.abs().amax(axis, keepdim=True) / 127 / 2 * (1 + 2.0**-9) + 1e-30
                ).all()


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=40),
    st.booleans(),
)
def test_any_numbers_survive_int8_within_half_a_step_and_twice_is_once(
    values: list[float], column: bool
) -> None:
    tensor = torch.tensor(values)[:, None] if column else torch.tensor(values)
    once = passed({"x": tensor}, "int8")["x"]
    step = tensor.abs().max().double() / 127 * (1 + 2.0**-9) + 1e-37
    assert torch.isfinite(once).all() or tensor.abs().max() > 3e38
    if tensor.abs().max() < 3e38:
        assert ((once.double() - tensor.double()).abs() <= step / 2).all()
        assert torch.equal(passed({"x": once}, "int8")["x"], once)


def test_a_rank_with_small_numbers_is_not_drowned_by_a_large_one() -> None:
    A = torch.ones(2, 64)
    A[1] = 1e-4 * torch.linspace(-1, 1, 64)
    B = torch.ones(64, 2)
    B[:, 1] = 1e-4 * torch.linspace(-1, 1, 64)
    back = passed(Factors(A, B, 1.0), "int8")
    assert (back.A[1] - A[1]).norm() < 0.01 * A[1].norm()
    assert (back.B[:, 1] - B[:, 1]).norm() < 0.01 * B[:, 1].norm()


@pytest.mark.parametrize(("how", "each"), [("none", 4), ("fp16", 2), ("int8", 1)])
def test_bytes_are_the_theory_within_one_percent(how: Any, each: int) -> None:
    """``r_i (d + k)`` numbers for each site."""
    adapter = content(rank=4, out=1024, inner=1024)["adapter"]
    theory = 4 * 4 * (1024 + 1024) * each
    assert numbers(adapter) * each == theory
    assert theory <= sent_bytes(adapter, how) <= 1.01 * theory
    assert sent_bytes(adapter, how) == nbytes(squeeze(adapter, how))


@pytest.mark.parametrize("how", ["none", "fp16", "int8"])
def test_what_is_private_is_refused(how: Any) -> None:
    tree = {"method": {"own": Factors(torch.ones(2, 3), seal(torch.ones(3, 2)), 1.0)}}
    with pytest.raises(PrivacyError, match=r"method/own\.B.*private"):
        sent_bytes(tree, how)


@pytest.mark.parametrize(
    "node",
    [
        {"~": "int8"},
        {"~": "int8", "of": "float32", "x": torch.ones(3, 3), "scale": torch.ones(3)},
        {"~": "fp16", "of": "int64", "x": torch.ones(3).half()},
        {
            "~": "int8",
            "of": "float32",
            "x": torch.ones(3, 5).to(torch.int8),
            "scale": torch.ones(4).bfloat16(),
        },
        {"~": "factors", "sides": [1, 2], "scale": 1.0},
        {"~": "zip", "of": "float32", "x": torch.ones(3)},
    ],
)
def test_an_altered_message_is_an_error_in_words(node: Any) -> None:
    with pytest.raises(AdapterError, match="altered"):
        expand({"a": [node]})


def test_a_compressed_run_resumes_bit_for_bit_and_costs_less(
    tiny_bert: Path, silos: Path, tmp_path: Path
) -> None:
    def job(how: str) -> Any:
        return tiny_job(
            tiny_bert,
            silos,
            federation={"fraction": 0.7, "head": "shared"},
            run={"compress": how, "rounds": 2},
        )

    for how in ("none", "int8"):
        run(job(how), tmp_path / how)
    for stop in (StopAfter(1), StopAfter(2)):
        with pytest.raises(KeyboardInterrupt):
            run(job("int8"), tmp_path / "cut", resume=True, callbacks=[stop])
    run(job("int8"), tmp_path / "cut", resume=True)
    assert adapters(tmp_path / "int8") == adapters(tmp_path / "cut")
    assert lines(tmp_path / "int8") == lines(tmp_path / "cut")
    whole, small = summary(tmp_path / "none"), summary(tmp_path / "int8")
    assert whole == {
        **small,
        **{key: whole[key] for key in ("bytes", "clients", "mean", "std", "tail10")},
    }
    for way in (
        "up",
        "down",
    ):  # 32 features to a scale of two bytes: 6 % more than a byte for each number
        assert 0.25 * whole["bytes"][way] < small["bytes"][way] < 0.27 * whole["bytes"][way]
    assert adapters(tmp_path / "none") != adapters(tmp_path / "int8")
    assert abs(small["mean"] - whole["mean"]) < 0.1
