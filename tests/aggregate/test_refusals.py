"""What is refused: in one sentence that names the file and what is wrong in it, before anything is
written.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.aggregate.made import PREFIX, SITES, draw, many, write

from fedgrove.aggregate import aggregate
from fedgrove.cli import main
from fedgrove.ground.errors import AdapterError
from fedgrove.methods.fedit import MeanOfFactors
from fedgrove.methods.registry import catalogue
from fedgrove.methods.rule import Arrived, Outcome, stated

QUERY = "encoder.layer.1.attention.self.query"
A, B = f"{PREFIX}{QUERY}.lora_A.weight", f"{PREFIX}{QUERY}.lora_B.weight"
Change = Callable[[Path], object]


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Change:
    def apply(folder: Path) -> None:
        values = load_file(folder / "adapter_model.safetensors")
        change(values)
        save_file(values, folder / "adapter_model.safetensors")

    return apply


def config(**values: Any) -> Change:
    def apply(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return apply


def spoil(name: str, value: float) -> Change:
    return tensors(lambda held: held[name].view(-1)[5:6].fill_(value))


def put(**held: torch.Tensor) -> Change:
    return tensors(
        lambda all_: all_.update({name.replace("__", "."): value for name, value in held.items()})
    )


def cut(folder: Path, keep: float) -> None:
    path = folder / "adapter_model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content))])


def pickled(folder: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


def without(name: str) -> Change:
    return lambda folder: (folder / name).unlink()


def text(words: str) -> Change:
    return lambda folder: (folder / "adapter_config.json").write_text(words)


def other_site(folder: Path) -> None:
    sites = {**SITES, "encoder.layer.2.attention.self.query": (10, 7)}
    write(folder, draw(1, 3, sites), 6.0)


def wider(folder: Path) -> None:
    write(folder, draw(1, 3, {**SITES, QUERY: (11, 7)}), 6.0)


def longer(folder: Path) -> None:
    write(folder, draw(1, 3, {**SITES, QUERY: (10, 8)}), 6.0)


DAMAGE: dict[str, tuple[Change, str]] = {
    "another base": (
        config(base_model_name_or_path="other/model"),
        r"base model is 'other/model', but .*c0 has 'some/b",
    ),
    "another revision": (config(revision="v2"), "revision of the base model is 'v2'"),
    "fan in, fan out": (config(fan_in_fan_out=True), "fan_in_fan_out"),
    "an extra site": (
        other_site,
        r"layer\.2\.attention\.self\.query\.lora_A\.weight', which .*c0 lacks",
    ),
    "a missing site": (
        tensors(lambda t: (t.pop(A), t.pop(B))),
        r"lacks .*layer\.1.*query\.lora_A\.weight",
    ),
    "no B": (
        tensors(lambda t: t.pop(B)),
        r"query\.lora_A\.weight' has no lora_B; one half of the pair is missing",
    ),
    "no A": (
        tensors(lambda t: t.pop(A)),
        r"query\.lora_B\.weight' has no lora_A; one half of the pair is missing",
    ),
    "nan": (spoil(A, float("nan")), r"layer\.1.*query\.lora_A\.weight' holds NaN or Inf"),
    "inf": (spoil(B, float("inf")), r"layer\.1.*query\.lora_B\.weight' holds NaN or Inf"),
    "out": (wider, r"query\.lora_B\.weight' has 11 out features, but 10"),
    "in": (longer, r"query\.lora_A\.weight' has 8 in features, but 7"),
    "rank of A": (
        tensors(lambda t: t.update({A: torch.zeros(2, 7)})),
        r"lora_A\.weight' has shape \[2, 7\], but.* 3 in",
    ),
    "rank of B": (
        tensors(lambda t: t.update({B: torch.zeros(10, 4)})),
        r"lora_B\.weight' has shape \[10, 4\], but.* 3",
    ),
    "rank of the config": (config(r=4), r"lora_A\.weight' has shape \[3, 7\], but its rank is 4"),
    "a convolution": (
        tensors(lambda t: t.update({A: torch.zeros(3, 7, 1, 1)})),
        "must be a matrix",
    ),
    "an empty factor": (tensors(lambda t: t.update({A: torch.zeros(3, 0)})), "must be a matrix"),
    "whole numbers": (
        tensors(lambda t: t.update({A: torch.zeros(3, 7).int()})),
        r"lora_A\.weight' is stored as I32",
    ),
    "cut": (
        lambda folder: cut(folder, 0.9),
        r"c1/adapter_model\.safetensors is not a whole safetensors file",
    ),
    "cut in the header": (lambda folder: cut(folder, 0.01), "not a whole safetensors file"),
    "empty": (lambda folder: cut(folder, 0), "not a whole safetensors file"),
    "pickled": (pickled, r"adapter_model\.bin holds pickled weights"),
    "no weights": (
        without("adapter_model.safetensors"),
        r"adapter_model\.safetensors does not exist",
    ),
    "no config": (without("adapter_config.json"), r"adapter_config\.json does not exist"),
    "a broken config": (text("{"), r"adapter_config\.json cannot be read as JSON"),
    "a config that is a list": (text("[]"), r"adapter_config\.json does not hold a JSON object"),
    "dora without magnitudes": (config(use_dora=True), "use_dora is True"),
    "dora by its tensors": (
        put(**{f"{QUERY}__lora_magnitude_vector": torch.ones(10)}),
        "lora_magnitude_vector",
    ),
    "embeddings": (put(x__lora_embedding_A=torch.ones(3, 4)), "lora_embedding_A"),
    "two adapters": (
        put(**{f"{QUERY}__lora_A__other__weight": torch.ones(3, 7)}),
        "holds two adapters",
    ),
    "no lora": (
        tensors(lambda t: [t.pop(name) for name in list(t)] and t.update(x=torch.ones(1))),
        "no LoRA tensors",
    ),
    "bias": (config(bias="all"), "bias is 'all'"),
    "lora bias": (config(lora_bias=True), "biases"),
    "pissa": (config(init_lora_weights="pissa_niter_4"), "changes the base weights"),
    "ia3": (config(peft_type="IA3"), "peft_type is 'IA3'"),
    "no type": (config(peft_type=None), "only LoRA"),
    "no rank": (config(r=None), "r is None"),
    "alpha in words": (config(lora_alpha="16"), "lora_alpha is '16'"),
    "alpha zero": (config(lora_alpha=0), "lora_alpha is 0; it must be a number above 0"),
    "a pattern": (config(alpha_pattern={"(": 3}), "no regular expression"),
    "a pattern's value": (config(rank_pattern={"query": "3"}), "rank_pattern 'query' is '3'"),
    "other ranks": (
        lambda folder: write(folder, draw(1, 2), 4.0),
        "has rank 2, but 3 .*fedit needs equal ranks",
    ),
    "other scales": (config(lora_alpha=7), r"alpha / r of .* is 2\.33333, but 2 .*rescale=B"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_bad_adapter_is_refused(damage: str, tmp_path: Path) -> None:
    change, words = DAMAGE[damage]
    folders, _ = many(tmp_path / "in", [3, 3, 3], [6.0] * 3)
    change(folders[1])
    before = sorted(path for path in tmp_path.rglob("*"))
    with pytest.raises(AdapterError, match=words) as caught:
        aggregate("fedit", folders, tmp_path / "new" / "out")
    assert str(folders[1]) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert sorted(path for path in tmp_path.rglob("*")) == before


def test_a_bad_previous_output_is_refused(tmp_path: Path) -> None:
    folders, _ = many(tmp_path, [3, 3], [6.0] * 2)
    with pytest.raises(AdapterError, match="has no _global"):
        aggregate("fedrot-lora", folders, tmp_path / "out", previous=tmp_path)
    aggregate("fedit", folders, tmp_path / "one")
    spoil(A, float("nan"))(tmp_path / "one" / "_global")
    with pytest.raises(AdapterError, match=r"_global/adapter_model.*holds NaN"):
        aggregate("fedrot-lora", folders, tmp_path / "out", previous=tmp_path / "one")
    smaller, _ = many(tmp_path / "small", [2, 2], [4.0] * 2)
    aggregate("fedit", smaller, tmp_path / "two")
    with pytest.raises(AdapterError, match="has rank 2, but 3"):
        aggregate("fedrot-lora", folders, tmp_path / "out", previous=tmp_path / "two")
    with pytest.raises(AdapterError, match="has rank 2, but the global rank is 3"):
        aggregate("fed-plora", folders, tmp_path / "out", previous=tmp_path / "two")
    (tmp_path / "two" / "aggregate.json").write_text('{"round": "x"}')
    with pytest.raises(AdapterError, match="round is 'x'"):
        aggregate("fedrot-lora", smaller, tmp_path / "out", previous=tmp_path / "two")
    assert not (tmp_path / "out").exists()


def test_a_folder_around_an_adapter_says_which_is_inside(tmp_path: Path) -> None:
    folders, _ = many(tmp_path / "run", [3, 3], [6.0] * 2)
    with pytest.raises(AdapterError) as caught:
        aggregate("fedit", [tmp_path / "run"], tmp_path / "out")
    assert str(caught.value).endswith(f"has some inside: name {folders[0]}, {folders[1]}.")


ASKED: dict[str, tuple[list[str], str]] = {
    "fedti": (["fedti"], "The method 'fedti' is unknown; did you mean fedit?"),
    "nothing like it": (["xyz"], "unknown; the rules are fed-plora"),
    "no rule": (["fedlease"], "fedlease has no offline rule: it averages routers"),
    "count": (["fedit", "--weights", "1,2"], "--weights has 2 numbers for 3 adapters"),
    "words": (["fedit", "--weights", "1,2,x"], "must be numbers with commas"),
    "negative": (["fedit", "--weights=-1,2,2"], "not negative"),
    "all zero": (["fedit", "--weights", "0,0,0"], "not all zero"),
    "nan": (["fedit", "--weights", "nan,1,1"], "must be finite"),
    "rank": (
        ["fedit", "--rank", "4"],
        "--rank has no meaning for fedit; it is the global rank of flexlora, hilora, raflora",
    ),
    "rank 0": (["flexlora", "--rank", "0"], "--rank is 0"),
    "key": (
        ["fedtreelora", "--option", "taw=0.1"],
        "--option taw: fedtreelora has no such key; did you mean tau?",
    ),
    "no keys": (["flora", "--option", "K=2"], "its keys are heads"),
    "value": (
        ["fedtreelora", "--option", "K=two"],
        'K must be an integer of at least 1, not "two"',
    ),
    "range": (["fedtreelora", "--option", "K=0"], "K must be an integer of at least 1, not 0"),
    "choice": (["fedtreelora", "--option", "distance=cosin"], "did you mean distance=cosine?"),
    "shape": (["fedtreelora", "--option", "K"], "write key=value"),
    "twice": (["fedtreelora", "--option", "K=2", "--option", "K=3"], "given twice"),
    "clusters": (
        ["hilora", "--option", "k_min=5", "--option", "k_max=3"],
        "k_min = 5 is above k_max = 3",
    ),
    "infinite": (["lora-fair", "--option", "lam=inf"], "lam"),
}


@pytest.mark.parametrize("asked", ASKED)
def test_a_bad_request_exits_with_2_and_one_sentence(
    asked: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (method, *options), words = ASKED[asked]
    folders, _ = many(tmp_path / "in", [3, 3, 3], [6.0] * 3)
    out = tmp_path / "new" / "out"
    assert main(["aggregate", method, *map(str, folders), "--out", str(out), *options]) == 2
    said = capsys.readouterr()
    assert words in said.err
    assert said.err.count("\n") == 1
    assert said.out == ""
    assert not out.parent.exists()


def test_names(tmp_path: Path) -> None:
    folders, _ = many(tmp_path / "in", [3, 3], [6.0] * 2)
    twin = write(tmp_path / "other" / "c0", draw(0, 3), 6.0)
    with pytest.raises(AdapterError, match="are both called 'c0'"):
        aggregate("fedit", [*folders, twin], tmp_path / "out")
    for name in ("_global", ".hidden", "noise.json", "aggregate.json"):
        with pytest.raises(AdapterError, match="cannot be called"):
            aggregate(
                "fedit", [*folders, write(tmp_path / name, draw(0, 3), 6.0)], tmp_path / "out"
            )
    with pytest.raises(AdapterError, match="no-such is not a directory"):
        aggregate("fedit", [*folders, tmp_path / "no-such"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_directory_that_exists_is_left_alone(tmp_path: Path) -> None:
    folders, _ = many(tmp_path / "in", [3, 3], [6.0] * 2)
    (tmp_path / "out").mkdir()
    with pytest.raises(AdapterError, match="exists already"):
        aggregate("fedit", folders, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_an_interrupted_aggregation_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders, _ = many(tmp_path / "in", [3, 3], [6.0] * 2)
    site = MeanOfFactors.site

    def stop(self: MeanOfFactors, given: Arrived) -> Outcome:
        if given.name == QUERY:
            raise KeyboardInterrupt
        return site(self, given)

    monkeypatch.setattr(MeanOfFactors, "site", stop)
    with pytest.raises(KeyboardInterrupt):
        aggregate("fedit", folders, tmp_path / "deep" / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_a_result_that_overflows_float32_is_refused(tmp_path: Path) -> None:
    factors = draw(0, 3)
    factors[QUERY] = (np.full((3, 7), 1e38), np.full((10, 3), 1.0))
    alphas = {"alpha_pattern": {QUERY: 300.0}}
    folders = [
        write(tmp_path / "a", factors, 6.0, dtype=torch.float32, **alphas),
        write(tmp_path / "b", factors, 6.0, dtype=torch.float32),
    ]
    with pytest.raises(AdapterError, match="overflows"):
        aggregate("flora", folders[::-1], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_every_method_has_a_rule_or_a_reason() -> None:
    for kind in catalogue().values():
        found = stated(kind)
        assert "Rule)" not in str(found), kind.name  # neither a rule nor a reason of its own
