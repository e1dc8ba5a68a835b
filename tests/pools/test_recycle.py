"""Recycling on a tiny ViT: images out of members, a meta-LoRA on them, a head of class means."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.tiny import picture, save_pictures, save_vit, tiny_job, without_reports
from torch import Tensor

import fedgrove as fg
from fedgrove.adapters.assembly import Assembly
from fedgrove.cli import main
from fedgrove.ground.errors import FedgroveError
from fedgrove.job import Job
from fedgrove.pools import Pool
from fedgrove.pools.inversion import Effort, invert, objective, statistics, variation
from fedgrove.pools.recycle import Episode, MetaTraining, distances, drawn, learn, loss_of, recycle
from fedgrove.pools.recycled import images_of, labelled

EFFORT, COURSE = Effort(each=4, steps=12), MetaTraining(episodes=6, ways=2, queries=2, rank=2)


@pytest.fixture(scope="module")
def members(tmp_path_factory: pytest.TempPathFactory) -> Pool:
    """Two classifiers of red and blue."""
    root = tmp_path_factory.mktemp("recycle")
    silos = save_pictures(root / "silos", clients=2, images=12)
    job = Job.build(
        {
            "model": {"name": str(save_vit(root / "vit"))},
            "lora": {"rank": 4},
            "data": {"source": "silos", "path": str(silos), "task": "classify-images"},
            "train": {
                "lr": 5e-3,
                "batch_size": 4,
                "local_steps": 6,
                "dtype": "float32",
                "threads": 1,
                "device": "cpu",
            },
            "method": {"name": "local"},
            "run": {"rounds": 1, "seed": 7, "out": str(root / "run")},
        }
    )
    with without_reports():
        run = fg.run(job)
    return fg.pool([run.path], router="arrow")


def test_images_are_routed_by_their_patches(members: Pool) -> None:
    draw = random.Random(8)
    images = [picture(label, draw) for label in ("red", "blue", "red")]
    together = members.model.logits(images)
    alone = torch.cat([members.model.logits([each]) for each in images])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
    one = members.without("site-1")
    torch.testing.assert_close(
        one.model.logits(images), members.member("site-0").logits(images), atol=1e-5, rtol=1e-5
    )


def frozen(pool: Pool) -> list[Tensor]:
    found = [value.clone() for value in pool.kernel.base.model.parameters()]
    for each in pool.members:
        found += [f.A.clone() for f in each.adapter.values()]
        found += [f.B.clone() for f in each.adapter.values()]
        found += [value.clone() for value in each.head.values()]
    return found


def test_an_image_is_what_its_member_takes_for_its_class(members: Pool) -> None:
    own = members.member("site-0")
    made = invert(members.kernel, own.assembly, "site-0", EFFORT, None)
    assert made.best < made.first
    assert [each["label"] for each in made.examples] == [0] * 4 + [1] * 4
    logits = members.kernel.logits(own.assembly, made.examples)
    assert (logits.argmax(-1) == torch.tensor([0] * 4 + [1] * 4)).float().mean() >= 0.75
    again = invert(members.kernel, own.assembly, "site-0", EFFORT, None)
    pairs = zip(made.examples, again.examples, strict=True)
    assert all(torch.equal(one["pixels"], other["pixels"]) for one, other in pairs)


def test_real_images_pull_the_statistics(members: Pool, tmp_path: Path) -> None:
    save_pictures(tmp_path / "public", clients=1, images=6)
    paths = [path for path, _ in labelled(tmp_path / "public" / "site-0")]
    real = statistics(members.kernel, images_of(members, paths))
    assert set(real) == set(members.kernel.base.sites)
    own = members.member("site-0").assembly
    kernel = members.kernel
    images = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    labels = torch.tensor([0, 1, 0, 1])
    with kernel.opened(own, train=False) as live, torch.no_grad():
        plain, pulled = (
            objective(kernel, live, images, labels, each, Effort(prior=0.5))
            for each in (None, real)
        )
    logits, seen = inputs_of(members, own, images)
    entropy = torch.nn.functional.cross_entropy(logits, labels)
    assert float(plain) == pytest.approx(float(entropy + 1e-3 * variation(images)), rel=1e-5)
    prior = 0.0
    for site, x in seen.items():
        line = x.double().flatten(0, -2).numpy()
        prior += float(np.linalg.norm(line.mean(0) - real[site][0].double().numpy()))
        prior += float(np.linalg.norm(line.var(0) - real[site][1].double().numpy()))
    assert float(pulled - plain) == pytest.approx(0.5 * prior, rel=1e-4)
    made = invert(kernel, own, "site-0", Effort(each=4, steps=12, prior=1.0), real)
    assert made.best < made.first


def inputs_of(
    members: Pool, assembly: Assembly, images: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits of a member, and what each site is given while it runs."""
    kernel, seen = members.kernel, {}
    hooks = []
    for name in kernel.base.sites:

        def keep(_: object, args: tuple[Tensor], name: str = name) -> None:
            seen[name] = args[0]

        hooks.append(kernel.base.model.get_submodule(name).register_forward_pre_hook(keep))
    batch = {"pixel_values": images}
    with (
        kernel.opened(assembly, train=False) as live,
        kernel.hooked.running(batch, live),
        torch.no_grad(),
    ):
        logits = kernel.reader.logits(live.head, batch)
    for hook in hooks:
        hook.remove()
    return logits, seen


def test_total_variation_by_hand() -> None:
    images = torch.arange(8.0).view(1, 1, 2, 4)
    assert float(variation(images)) == 4 * 16 + 6 * 1


def test_teachers_and_base_are_bitwise_what_they_were(members: Pool) -> None:
    before = frozen(members)
    made = recycle(members, EFFORT, COURSE)
    assert len(made.losses) == 6
    assert all(torch.equal(*pair) for pair in zip(before, frozen(members), strict=True))
    assert any(bool(factors.B.abs().max() > 0) for factors in made.adapter.values())


def test_an_episode_is_its_formula(members: Pool) -> None:
    kernel = members.kernel
    images = {
        name: invert(kernel, members.member(name).assembly, name, EFFORT, None).examples
        for name in members.names
    }
    teachers = {
        name: kernel.logits(members.member(name).assembly, own) for name, own in images.items()
    }
    for several in (False, True):
        rng = np.random.default_rng(3)
        episode: Episode = drawn(images, teachers, COURSE, rng, several=several)
        with kernel.opened(Assembly(), train=False) as live, torch.no_grad():
            got = float(loss_of(kernel, live, episode))
        support, query = (
            kernel.features(part).double() for part in (episode.support, episode.query)
        )
        total = 0.0
        for number, own in enumerate(query):
            near = []
            for way in range(2):
                mean = support[episode.support_labels == way].mean(0)
                near.append(-float((own - mean).square().sum()))
            p = np.exp(near) / np.exp(near).sum()
            if episode.taught is None:
                total -= float(np.log(p[int(episode.query_labels[number])]))
            else:
                taught = episode.taught[number].double().numpy()
                total += float((taught * np.log(taught / p)).sum())
        assert (episode.taught is None) == several
        assert got == pytest.approx(total / len(query), rel=1e-4, abs=1e-6)


def test_distances_are_those_to_class_means() -> None:
    support = torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 4.0]])
    got = distances(support, torch.tensor([0, 0, 1]), torch.tensor([[1.0, 1.0]]))
    assert got.tolist() == [[-1.0, -10.0]]


def test_learning_lowers_the_loss_of_its_episodes(members: Pool) -> None:
    images = {
        name: invert(members.kernel, members.member(name).assembly, name, EFFORT, None).examples
        for name in members.names
    }
    _, losses = learn(
        members, images, MetaTraining(episodes=60, ways=2, queries=2, rank=2, lr=1e-2)
    )
    assert sum(losses[-20:]) < sum(losses[:20])


def test_from_the_command_line(
    members: Pool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    members.save(tmp_path / "pool")
    shots = tmp_path / "shots"
    draw = random.Random(5)
    for label in ("red", "blue"):
        (shots / label).mkdir(parents=True)
        for number in range(3):
            picture(label, draw).save(shots / label / f"{number}.png")
    few = ["--each", "3", "--steps", "3", "--episodes", "2", "--ways", "2"]
    out = tmp_path / "out"
    told = ["recycle", str(tmp_path / "pool"), "--out", str(out), "--shots", str(shots), *few]
    assert main(told) == 0
    assert "give away" in capsys.readouterr().out
    model = fg.load(out)
    assert model.labels == ("blue", "red")
    asked = [str(shots / "red" / "0.png"), str(shots / "blue" / "0.png")]
    assert model.predict(asked) == ["red", "blue"]
    assert len(list((out / "inverted").rglob("*.png"))) == 2 * 2 * 3
    assert len(json.loads((out / "recycled.json").read_text(encoding="utf-8"))["losses"]) == 2
    for changes, sentence in (
        (["--ways", "3"], "--ways 3 is more than the members' 2 classes"),
        (["--support", "3"], "too few for 3 shots"),
        (["--shots", str(tmp_path / "none")], "does not exist"),
    ):
        bad = ["recycle", str(tmp_path / "pool"), "--out", str(tmp_path / "x"), *few, *changes]
        assert main(bad) == 2
        assert sentence in capsys.readouterr().err
        assert not (tmp_path / "x").exists()


def test_texts_are_refused(tiny_bert: Path, silos: Path, tmp_path: Path) -> None:
    with without_reports():
        run = fg.run(
            tiny_job(
                tiny_bert,
                silos,
                method={"name": "local"},
                run={"rounds": 1, "out": str(tmp_path / "run")},
            )
        )
    with pytest.raises(FedgroveError, match="texts are no numbers"):
        recycle(fg.pool([run.path]), EFFORT, COURSE)
