"""Pools of finished adapters, on members that were trained apart on planted data: groups of rows
whose words nobody else has.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny import BAD, FILLER, GOOD, save_bert, tiny_job, without_reports
from torch import Tensor

import fedgrove as fg
from fedgrove.adapters.assembly import Assembly
from fedgrove.adapters.routers import Components, Retrieve
from fedgrove.cli import main
from fedgrove.ground.errors import FedgroveError
from fedgrove.interop import peft
from fedgrove.pools import Pool
from fedgrove.pools.against import against, owners_rows
from fedgrove.use.result import Result

GROUPS = 4
NAMES = tuple(f"site-{group}" for group in range(GROUPS))
TEXTS = ["the good a", "fine day film fine film", "the bad was", "sad very and happy"]


def row(group: int, draw: random.Random) -> dict[str, str]:
    """A row of words that only its group has."""
    good = draw.random() < 0.5
    word = GOOD[group] if good else BAD[group]
    filler = [draw.choice(FILLER[2 * group : 2 * group + 2]) for _ in range(draw.randint(2, 5))]
    filler.insert(draw.randrange(len(filler)), word)
    return {"text": " ".join(filler), "label": "positive" if good else "negative"}


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Result:
    """A finished run of four members that trained alone."""
    root = tmp_path_factory.mktemp("planted")
    bert = save_bert(root / "bert")
    (root / "silos").mkdir()
    for group, name in enumerate(NAMES):
        draw = random.Random(group)
        lines = [json.dumps(row(group, draw)) for _ in range(30)]
        (root / "silos" / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    job = tiny_job(
        bert,
        root / "silos",
        method={"name": "local"},
        train={"local_steps": 6},
        run={"rounds": 2, "out": str(root / "run")},
    )
    with without_reports():
        return fg.run(job)


def made(run: Result, router: str = "retrieve", **options: Any) -> Pool:
    """A pool in float64."""
    kinds = {"retrieve": "mean", "roc": "gaussian", "attention": "mean"}
    options = {"signature": kinds.get(router), "dtype": "float64", **options}
    return fg.pool([run.path], router=router, **options)


def logits(model: Any, texts: list[str] = TEXTS) -> Tensor:
    found: Tensor = model.logits(texts)
    return found


def folders(run: Result) -> list[Path]:
    return [run.client(name).path for name in NAMES]


# ------------------------------------------------------------------- what it computes
@pytest.mark.parametrize(
    ("router", "options"),
    [
        ("retrieve", {}),
        ("retrieve", {"compose": "fusion"}),
        ("arrow", {}),
        ("attention", {}),
        ("uniform", {}),
        ("uniform", {"compose": "fusion"}),
        ("roc", {"options": {"gamma": 1.0}}),
        ("roc", {"options": {"gamma": 1.0, "components": "trained"}}),
    ],
)
def test_a_pool_of_one_is_that_member(planted: Result, router: str, options: Any) -> None:
    whole = made(planted, router, **options)
    one = whole.without(*NAMES[1:])
    wanted = logits(one.member("site-0"))
    assert (wanted - logits(one.base())).abs().max() > 1e-3
    torch.testing.assert_close(logits(one.model), wanted, atol=1e-12, rtol=1e-9)


def test_an_ensemble_of_one_has_its_probabilities(planted: Result) -> None:
    for router in ("retrieve", "uniform"):
        one = made(planted, router, compose="ensemble").without(*NAMES[1:])
        wanted = logits(one.member("site-0")).softmax(-1)
        torch.testing.assert_close(logits(one.model).exp(), wanted, atol=1e-12, rtol=1e-9)


def test_the_nearest_members_mixture_by_hand(planted: Result) -> None:
    """Every example: its k members' updates and heads averaged, as a plain assembly."""
    found = made(planted, top_k=2)
    got = logits(found.model)
    for text, weights, own in zip(TEXTS, found.route(TEXTS), got, strict=True):
        chosen = [name for name, weight in weights.items() if weight]
        assert len(chosen) == 2
        few = found.without(*(set(NAMES) - set(chosen)))
        torch.testing.assert_close(
            logits(few.like("uniform").model, [text])[0], own, atol=1e-12, rtol=1e-9
        )


def test_an_ensemble_is_the_mean_of_probabilities(planted: Result) -> None:
    found = made(planted, compose="ensemble", top_k=2)
    each = {name: logits(found.member(name)).softmax(-1) for name in NAMES}
    got = logits(found.model).exp()
    for number, weights in enumerate(found.route(TEXTS)):
        wanted = sum(weight * each[name][number] for name, weight in weights.items())
        torch.testing.assert_close(got[number], wanted, atol=1e-12, rtol=1e-9)
    alike = made(planted, "uniform", compose="ensemble")
    wanted = torch.stack(list(each.values())).mean(0)
    torch.testing.assert_close(logits(alike.model).exp(), wanted, atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("router", ["retrieve", "arrow", "attention", "roc"])
def test_rows_together_are_rows_one_by_one(planted: Result, router: str) -> None:
    found = made(planted, router)
    alone = torch.cat([logits(found.model, [text]) for text in TEXTS])
    torch.testing.assert_close(logits(found.model), alone, atol=1e-10, rtol=1e-9)


@pytest.mark.parametrize("router", ["retrieve", "arrow", "attention", "roc"])
def test_the_order_of_members_changes_nothing(planted: Result, router: str) -> None:
    found = made(planted, router)
    turned = Pool(list(reversed(found.members)), found.plan, found.kernel)
    torch.testing.assert_close(logits(turned.model), logits(found.model), atol=1e-12, rtol=1e-9)
    one, other = found.route(TEXTS), turned.route(TEXTS)
    for own, mirrored in zip(one, other, strict=True):
        assert own == pytest.approx(mirrored, abs=1e-12)


def test_uniform_fusion_is_fedit_and_mixture_is_flora(planted: Result) -> None:
    from fedgrove.aggregate import aggregate

    for compose, rule in (("fusion", "fedit"), ("mixture", "flora")):
        out = planted.path.parent / rule
        aggregate(rule, folders(planted), out)
        shared = fg.load(out / "_global" if (out / "_global").is_dir() else out, dtype="float64")
        ours = made(planted, "uniform", compose=compose)
        update = Assembly(ours.assembly.terms, ours.assembly.mix)
        theirs = Assembly(tuple(term for term in shared.assembly.terms), shared.assembly.mix)
        examples = ours.kernel.task.encode(
            [{"text": text} for text in TEXTS], ours.kernel.base.processor
        )
        got = ours.kernel.features(examples, update)
        torch.testing.assert_close(
            got, ours.kernel.features(examples, theirs), atol=1e-6, rtol=1e-5
        )


def test_no_member_is_run_for_a_row_that_did_not_choose_it(
    planted: Result, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedgrove.adapters import routers

    found = made(planted, top_k=1)
    seen: list[tuple[int, int]] = []
    real = routers._inner

    def counted(own: Any, choice: Any) -> Any:
        seen.append((own.number, len(own.rows)))
        return real(own, choice)

    monkeypatch.setattr(routers, "_inner", counted)
    texts = [row(1, random.Random(5))["text"] for _ in range(3)]
    texts += [row(2, random.Random(6))["text"]]
    logits(found.model, texts)
    assert set(seen) == {(1, 3), (2, 1)}


# ------------------------------------------------------------------- whom it finds
@pytest.mark.parametrize("router", ["retrieve", "roc"])
def test_the_router_finds_the_owner(planted: Result, router: str) -> None:
    found = made(planted, router, top_k=1)
    for group, name in enumerate(NAMES):
        draw = random.Random(100 + group)
        texts = [row(group, draw)["text"] for _ in range(12)]
        for weights in found.route(texts):
            assert max(weights, key=lambda each: weights[each]) == name


def test_a_masked_member_never_answers(planted: Result) -> None:
    found = made(planted, top_k=1).without("site-2")
    texts = [row(2, random.Random(9))["text"] for _ in range(4)]
    assert all(set(weights) == {"site-0", "site-1", "site-3"} for weights in found.route(texts))
    with pytest.raises(FedgroveError, match="without any member"):
        found.without(*NAMES)


def test_it_is_measured_beside_its_rivals(planted: Result) -> None:
    found = made(planted, top_k=1)
    rows = owners_rows(found)
    assert set(rows) == set(NAMES)
    done = against(found, rows, ["own", "base", "uniform", "best"], mask_own=True)
    assert list(done.measures) == ["pool", "masked", "own", "base", "uniform", "best"]
    for name in NAMES:
        assert done.shares[name][name] == pytest.approx(1.0)  # top-1 of far groups
        assert done.measures["pool"][name]["loss"] == pytest.approx(
            done.measures["own"][name]["loss"], rel=1e-9
        )
        assert done.measures["masked"][name]["loss"] != done.measures["own"][name]["loss"]
    means = {name: [] for name in NAMES}  # type: ignore[var-annotated]
    for name in NAMES:
        for own in rows.values():
            means[name].append(found.member(name).measures(own)["accuracy"])
    best = max(NAMES, key=lambda name: sum(means[name]))
    assert done.best == best
    assert done.mean("best") == pytest.approx(sum(means[best]) / GROUPS)


# ------------------------------------------------------------------- what it leaves
@pytest.mark.parametrize(
    ("router", "compose"),
    [("retrieve", "mixture"), ("retrieve", "ensemble"), ("arrow", None), ("roc", None),
     ("attention", None), ("uniform", "mixture"), ("uniform", "fusion")],
)  # fmt: skip
def test_what_is_saved_answers_alike(
    planted: Result, router: str, compose: Any, tmp_path: Path
) -> None:
    found = made(planted, router, compose=compose, dtype=None)
    found.save(tmp_path / "pool")
    wanted = logits(found.model)
    assert torch.equal(logits(fg.load(tmp_path / "pool")), wanted)
    back = fg.open_pool(tmp_path / "pool")
    assert torch.equal(logits(back.model), wanted)
    assert back.route(TEXTS) == found.route(TEXTS)
    masked = back.without("site-1")
    torch.testing.assert_close(
        logits(masked.model), logits(found.without("site-1").model), atol=1e-5, rtol=1e-5
    )
    with pytest.raises(FedgroveError, match="exists already"):
        found.save(tmp_path / "pool")


def test_a_pool_without_signatures_holds_nothing_of_data(planted: Result, tmp_path: Path) -> None:
    found = made(planted, "arrow", dtype=None)
    found.save(tmp_path / "pool")
    assert all(each.signature is None for each in found.members)
    held = b"".join(path.read_bytes() for path in (tmp_path / "pool").iterdir() if path.is_file())
    assert b"signature.mean" not in held
    assert not list(planted.path.rglob("signature*"))
    told = json.loads((tmp_path / "pool" / "pool.json").read_text(encoding="utf-8"))
    assert [each["signature"] for each in told["members"]] == [None] * GROUPS


def test_members_of_peft_users_are_members_too(planted: Result, tmp_path: Path) -> None:
    """Stock heads: only probabilities add up."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification

    bert = planted.job.model.name
    for number in range(2):
        torch.manual_seed(number)
        model = AutoModelForSequenceClassification.from_pretrained(bert, num_labels=2)
        config = LoraConfig(
            r=2 + number, lora_alpha=6, target_modules=["query"], task_type="SEQ_CLS"
        )
        whole = get_peft_model(model, config)
        for name, value in whole.named_parameters():
            if "lora_B" in name:
                value.data.normal_()
        whole.save_pretrained(str(tmp_path / f"user-{number}"))
    dirs = [tmp_path / "user-0", tmp_path / "user-1"]
    with pytest.raises(FedgroveError, match="--compose ensemble"):
        fg.pool(dirs, router="arrow")
    found = fg.pool(dirs, router="uniform", compose="ensemble")
    wanted = torch.stack([fg.load(each).logits(TEXTS).softmax(-1) for each in dirs]).mean(0)
    torch.testing.assert_close(logits(found.model).exp(), wanted, atol=1e-5, rtol=1e-5)
    with pytest.raises(FedgroveError, match=r"its head is|its labels are"):
        fg.pool([planted.path, dirs[0]])


def test_one_adapter_is_exported_where_there_is_one(planted: Result, tmp_path: Path) -> None:
    found = made(planted, "uniform", dtype=None)
    found.save(tmp_path / "pool")
    assert main(["export", str(tmp_path / "pool"), "--out", str(tmp_path / "one")]) == 0
    torch.testing.assert_close(
        logits(fg.load(tmp_path / "one")), logits(found.model), atol=1e-5, rtol=1e-5
    )
    one = ["export", str(tmp_path / "pool"), "--client", "site-1", "--out", str(tmp_path / "m")]
    assert main(one) == 0
    torch.testing.assert_close(
        logits(fg.load(tmp_path / "m")), logits(found.member("site-1")), atol=1e-5, rtol=1e-5
    )


# ------------------------------------------------------------------- the command line
def test_from_the_command_line(
    planted: Result, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "pool"
    assert main(
        ["pool", str(planted.path), "--out", str(out), "--router", "retrieve",
         "--signature", "mean", "--top-k", "1"]
    ) == 0  # fmt: skip
    assert "4 members" in capsys.readouterr().out
    text = row(3, random.Random(1))["text"]
    assert main(["predict", str(out), text, "--why"]) == 0
    told = capsys.readouterr().out
    assert "site-3 1.00" in told
    line = json.loads((out / "routes.jsonl").read_text(encoding="utf-8"))
    assert line["weights"]["site-3"] == 1.0
    assert set(line["scores"]) == set(NAMES)
    assert main(
        ["evaluate", str(out), "--against", "own,base,uniform,best", "--mask-own"]
    ) == 0  # fmt: skip
    shown = capsys.readouterr().out
    assert "masked" in shown
    assert "best single member" in shown
    page = (out / "pool.html").read_text(encoding="utf-8")
    for title in (
        "Who answers for whom",
        "A map of the members",
        "Why an input",
        "What it is worth",
    ):
        assert title in page
    assert "could not be shown" not in page
    assert main(["export", str(out), "--out", str(tmp_path / "x")]) == 2
    assert "chooses among 4 LoRA adapters" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
    assert main(["predict", str(out), "--client", "site-9", text]) == 2
    assert "no member 'site-9'" in capsys.readouterr().err


def test_signing_is_the_owner_s_own_act(
    planted: Result, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import shutil

    mine = tmp_path / "mine"
    shutil.copytree(planted.client("site-0").path, mine)
    data = tmp_path / "own.jsonl"
    draw = random.Random(3)
    lines = [json.dumps(row(0, draw)) for _ in range(25)]
    data.write_text("\n".join(lines) + "\n", encoding="utf-8")
    assert main(["sign", str(mine), "--data", str(data), "--noise", "2"]) == 0
    told = capsys.readouterr().out
    assert "mean of 20 examples, epsilon = " in told
    assert main(["sign", str(mine), "--data", str(data), "--kind", "gaussian", "--noise", "2"]) == 2
    assert "noise is for a signature of the kind mean" in capsys.readouterr().err
    found = fg.pool([planted.path / "adapters" / "site-1", mine], router="retrieve",
                    samples={"site-1": data})  # fmt: skip
    assert [each.signature.noise for each in found.members if each.signature] == [0.0, 2.0]


# ------------------------------------------------------------------- bad input
def broken(planted: Result, tmp_path: Path, name: str = "other") -> Path:
    import shutil

    folder = tmp_path / name
    shutil.copytree(planted.client("site-1").path, folder)
    return folder


def changed(folder: Path, **values: Any) -> Path:
    for file in (peft.CARD, peft.CONFIG):
        content = json.loads((folder / file).read_text(encoding="utf-8"))
        content |= {key: value for key, value in values.items() if key in content}
        (folder / file).write_text(json.dumps(content), encoding="utf-8")
    return folder


def test_bad_members_get_a_sentence(planted: Result, tmp_path: Path) -> None:
    first = planted.client("site-0").path

    def refused(match: str, *dirs: Path, **options: Any) -> None:
        with pytest.raises(FedgroveError, match=match) as caught:
            fg.pool(list(dirs) or [planted.path], **options)
        assert "\n" not in str(caught.value)

    refused("does not exist", tmp_path / "none")
    (tmp_path / "empty").mkdir()
    refused("is no run and no adapter directory", tmp_path / "empty")
    refused("both called 'site-0'", planted.path, first)
    refused("are the same adapter", planted.path, broken(planted, tmp_path, "twin"))
    other = changed(broken(planted, tmp_path), model="elsewhere/another", labels=["a", "b"])
    refused("is an adapter of 'elsewhere/another'", first, other)
    odd = changed(broken(planted, tmp_path, "labels"), labels=["positive", "neutral"])
    refused("only one has 'negative', 'neutral'", first, odd)
    dora = changed(broken(planted, tmp_path, "dora"), use_dora=True)
    refused("use_dora", first, dora)
    from safetensors.torch import load_file, save_file

    nan = broken(planted, tmp_path, "nan")
    tensors = load_file(nan / peft.HEAD)
    tensors["bias"][0] = float("nan")
    save_file(tensors, nan / peft.HEAD)
    refused("'bias' holds NaN or Inf", first, nan)
    headless = broken(planted, tmp_path, "headless")
    (headless / peft.HEAD).unlink()
    refused("has no head that was trained", first, headless)
    untrained = broken(planted, tmp_path, "untrained")
    card = json.loads((untrained / peft.CARD).read_text(encoding="utf-8"))
    (untrained / peft.CARD).write_text(json.dumps(card | {"head_trained": False}))
    refused("has no head that was trained", first, untrained)
    steps = broken(planted, tmp_path, "steps")
    (steps / peft.CARD).write_text(json.dumps(card | {"ordinal": True}))
    refused("its ordinal is true, but not set in", first, steps)
    refused("--top-k 9 is more than the pool's 4", top_k=9)
    refused("--top-k 0", top_k=0)
    refused("choose from retrieve, arrow", router="magic")
    refused("adds up by mixture", router="arrow", compose="fusion")
    refused("the router roc has no such key", router="roc", options=["tua=1"])
    refused("--option gamma must be", router="roc", options={"gamma": 2.0})
    refused(r"no signature, which --router retrieve reads.*arrow", router="retrieve")
    refused("kind gaussian, and this one is a mean", router="roc", signature="mean")
    refused("no such member", samples={"site-9": tmp_path / "x.csv"})
    data = tmp_path / "one.jsonl"
    data.write_text(json.dumps(row(0, random.Random(0))) + "\n", encoding="utf-8")
    refused("1 examples to make a signature of", router="retrieve", samples={"site-0": data})
    scaled = changed(broken(planted, tmp_path, "scaled"), lora_alpha=64)
    refused(
        "has the scale .*use --compose mixture", first, scaled, router="uniform", compose="fusion"
    )
    assert not list(planted.path.rglob("signature*"))


def test_labels_are_matched_by_name(planted: Result, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    turned = broken(planted, tmp_path, "turned")
    card = json.loads((turned / peft.CARD).read_text(encoding="utf-8"))
    changed(turned, labels=list(reversed(card["labels"])))
    head = load_file(turned / peft.HEAD)
    save_file(
        {name: value.flip(0).contiguous() for name, value in head.items()}, turned / peft.HEAD
    )
    first = planted.client("site-0").path
    plain = fg.pool([first, planted.client("site-1").path], router="uniform")
    again = fg.pool([first, turned], router="uniform")
    assert torch.equal(logits(again.model), logits(plain.model))


def test_other_commands_say_that_it_is_a_pool(
    planted: Result, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = str(planted.path)
    assert main(["predict", run, "--client", "site-0", "--why", "the"]) == 2
    assert "--why is for a pool" in capsys.readouterr().err
    assert main(["evaluate", run, "--against", "own"]) == 2
    assert "are for a pool" in capsys.readouterr().err
    assert main(["predict", run, "the"]) == 2
    assert "one of its clients with --client" in capsys.readouterr().err


def test_routers_are_read_by_their_names_alone() -> None:
    assert Retrieve(1).linear is False
    assert Components(1).needs_features


# ------------------------------------------------------------------- models that write
@pytest.fixture(scope="module")
def writers(tiny_llama: Path, exchanges: Path, tmp_path_factory: pytest.TempPathFactory) -> Result:
    """Three language models that trained alone."""
    job = tiny_job(
        tiny_llama,
        exchanges,
        data={"task": "generate", "max_length": 32, "max_new_tokens": 4},
        method={"name": "local"},
        train={"local_steps": 6, "lr": 2e-2},
        run={"rounds": 1, "out": str(tmp_path_factory.mktemp("writers") / "run")},
    )
    with without_reports():
        return fg.run(job)


PROMPTS = ["what is not good", "the film what is not happy", "what is not bright"]


@pytest.mark.parametrize("router", ["retrieve", "arrow", "roc"])
def test_language_models_write_as_their_members_do(writers: Result, router: str) -> None:
    found = made(writers, router, options={"gamma": 1.0} if router == "roc" else {})
    one = found.without("site-1", "site-2")
    member = found.member("site-0")
    near = 1e-10
    if router == "roc":  # its singular triplets are in the factors' own precision
        near = 1e-5
    torch.testing.assert_close(
        one.model.logits(PROMPTS), member.logits(PROMPTS), atol=near, rtol=near
    )
    assert one.predict(PROMPTS) == member.predict(PROMPTS)
    apart = found.without("site-0", "site-1").predict(PROMPTS)
    assert apart == found.member("site-2").predict(PROMPTS)
    together = found.predict(PROMPTS)
    assert together == [found.predict([prompt])[0] for prompt in PROMPTS]
    assert all(sum(own.values()) == pytest.approx(1) for own in found.route(PROMPTS))
    rows = owners_rows(found)["site-0"]
    assert one.measures(rows)["loss"] == pytest.approx(member.measures(rows)["loss"], rel=near)


def test_language_models_have_no_probabilities_to_average(writers: Result) -> None:
    with pytest.raises(FedgroveError, match="one class of several"):
        made(writers, "uniform", compose="ensemble")


# ------------------------------------------------------------------- a router that trains
def test_a_trained_router_moves_nothing_else(planted: Result, tmp_path: Path) -> None:
    from fedgrove.pools.attend import attended, left_out, router_of

    found = made(planted, "attention", top_k=4, signature=None, dtype=None)
    rows = [row(group, random.Random(20 + group)) for group in range(GROUPS) for _ in range(6)]
    before = found.measures(rows)["loss"]
    better = attended(found, rows, epochs=8, lr=2e-2)
    assert better.measures(rows)["loss"] < before
    assert any(
        not torch.equal(value, router_of(found.assembly)[name])
        for name, value in router_of(better.assembly).items()
    )
    for term, other in zip(found.assembly.terms, better.assembly.terms, strict=True):
        for site, factors in term.adapter.items():
            assert torch.equal(factors.A, other.adapter[site].A)
            assert torch.equal(factors.B, other.adapter[site].B)
    better.save(tmp_path / "pool")
    assert torch.equal(logits(fg.open_pool(tmp_path / "pool").model), logits(better.model))
    few = better.without("site-1")
    kept = router_of(few.assembly)
    assert all(torch.equal(value, kept[name]) for name, value in router_of(better.assembly).items())
    gone = [left_out(NAMES, 0, stretch) for stretch in range(40)]
    assert max(map(len, gone)) == GROUPS - 2
    assert min(map(len, gone)) == 0
    with pytest.raises(FedgroveError, match="arrow has nothing that trains"):
        attended(made(planted, "arrow"), rows)


# ------------------------------------------------------------------- newcomers
def shots(folder: Path, group: int, count: int, labels: tuple[str, ...] = ()) -> Path:
    draw = random.Random(50 + group)
    rows = [row(group, draw) for _ in range(count)]
    lines = [json.dumps(each) for each in rows if not labels or each["label"] in labels]
    path = folder / "newcomer.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_a_newcomer_is_answered_for_by_those_who_trained(planted: Result, tmp_path: Path) -> None:
    from fedgrove.pools.newcomer import by_routing
    from fedgrove.use.adapt import adapt

    done = adapt(planted.path, shots(tmp_path, 1, 30), out=tmp_path / "routed", way=by_routing)
    assert list(done.measures) == ["zero-shot", "by routing"]
    model = fg.load(tmp_path / "routed")  # one ordinary adapter
    assert (tmp_path / "routed" / peft.CONFIG).is_file()
    uniform = fg.pool([planted.path], router="uniform").model
    near = (logits(model) - logits(uniform)).abs().max()
    assert 1e-6 < near < 1.0  # a weighted mean of the same members, not the plain one


def test_prototypes_are_distances(planted: Result, tmp_path: Path) -> None:
    from fedgrove.use.adapt import adapt
    from fedgrove.use.prototypes import by_prototypes

    data = shots(tmp_path, 1, 30)
    done = adapt(planted.path, data, out=tmp_path / "proto", way=by_prototypes)
    assert done.measures["by prototypes"]["accuracy"] == 1.0  # a word of its own for each class
    model = fg.load(tmp_path / "proto")
    few = tmp_path / "few"
    few.mkdir()
    with pytest.raises(FedgroveError, match="no example of 'positive'"):
        adapt(
            planted.path,
            shots(few, 2, 30, labels=("negative",)),
            out=few / "out",
            way=by_prototypes,
        )
    assert not (few / "out").exists()
    assert set(model.labels) == {"negative", "positive"}


def test_a_prototype_head_is_the_nearest_mean() -> None:
    from fedgrove.use.prototypes import prototype_head

    draw = torch.Generator().manual_seed(0)
    features = torch.randn(12, 5, generator=draw, dtype=torch.float64)
    labels = [0, 1, 2] * 4
    head = prototype_head(features, labels, ["a", "b", "c"])
    asked = torch.randn(7, 5, generator=draw, dtype=torch.float64)
    means = torch.stack([features[number::3].mean(0) for number in range(3)])
    wanted = -(asked[:, None] - means).square().sum(-1)
    got = asked @ head["weight"].T + head["bias"]
    torch.testing.assert_close(got.softmax(-1), wanted.softmax(-1), atol=1e-12, rtol=1e-12)


def test_how_is_checked(
    planted: Result, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = str(shots(tmp_path, 0, 12))
    assert main(["adapt", str(planted.path), "--data", data, "--how", "magic"]) == 2
    assert "choose from train, route and prototypes" in capsys.readouterr().err
