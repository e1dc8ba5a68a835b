"""Images as a task: the processor's own pixels, runs of a tiny ViT, and the same logits
everywhere.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tests.tiny import picture, save_pictures, save_vit, tiny_job
from transformers import AutoImageProcessor

import fedgrove as fg
from fedgrove.federation.images import picture_of
from fedgrove.federation.tasks import ClassifyImages
from fedgrove.ground.errors import DataError, FedgroveError
from fedgrove.start import run

TASK = ClassifyImages(labels=("blue", "red"))


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_vit(tmp_path_factory.mktemp("vit") / "tiny-vit")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pictures(tmp_path_factory.mktemp("pictures") / "silos")


def some(count: int = 5) -> list[Image.Image]:
    draw = random.Random(1)
    return [
        picture("red" if index % 2 else "blue", draw, side=20 + 3 * index) for index in range(count)
    ]


SETTINGS: list[dict[str, Any]] = [
    {},
    {"do_normalize": False},
    {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.6, 0.7], "resample": 3},
    {"do_rescale": False, "do_normalize": False},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda value: ", ".join(value) or "plain")
def test_pixels_are_those_of_the_models_own_processor(vit: Path, settings: dict[str, Any]) -> None:
    processor = AutoImageProcessor.from_pretrained(str(vit), backend="pil", **settings)
    images = some()
    rows = [{"image": picture_of(image, "image", "here"), "label": "red"} for image in images]
    examples = TASK.encode(rows, processor)
    assert all(
        example["pixels"].dtype == torch.uint8 for example in examples
    )  # a quarter of float32's memory
    batch = TASK.collate(examples, 0)
    wanted = torch.from_numpy(np.stack(processor(images=images)["pixel_values"])).float()
    torch.testing.assert_close(TASK.inputs(batch)["pixel_values"], wanted, rtol=0, atol=1e-6)
    assert batch["labels"].tolist() == [1] * 5


def test_a_processor_that_crops_is_obeyed(vit: Path) -> None:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    processor = CLIPImageProcessorPil(
        size={"shortest_edge": 18}, crop_size={"height": 16, "width": 16}
    )
    image = some()[3].resize((40, 20))
    pixels = TASK.collate(TASK.encode([{"image": image}], processor), 0)["pixel_values"]
    torch.testing.assert_close(
        pixels[0], torch.from_numpy(processor(images=[image])["pixel_values"][0])
    )


def test_no_label_no_labels(vit: Path) -> None:
    processor = AutoImageProcessor.from_pretrained(str(vit), backend="pil")
    assert "labels" not in TASK.collate(TASK.encode([{"image": some(1)[0]}], processor), 0)
    assert TASK.encode([], processor) == []
    with pytest.raises(
        DataError, match=r"row 1 has the label 'green', but the model knows only: 'blue', 'red'"
    ):
        TASK.encode([{"image": some(1)[0], "label": "green"}], processor)


def in_peft(model: Path, folder: Path, images: list[Image.Image], stock: bool) -> torch.Tensor:
    """Logits by PEFT alone, with the documented pooling for our head."""
    from peft import PeftModel
    from transformers import AutoModel, AutoModelForImageClassification

    kind = AutoModelForImageClassification if stock else AutoModel
    base = kind.from_pretrained(str(model), dtype=torch.float32)
    peft = PeftModel.from_pretrained(base, str(folder)).eval()
    batch = AutoImageProcessor.from_pretrained(str(model), backend="pil")(
        images=images, return_tensors="pt"
    )
    with torch.no_grad():
        if stock:
            logits: torch.Tensor = peft(**batch).logits
            return logits
        pooled = peft(**batch).last_hidden_state.mean(1)
    head = load_file(folder / "head.safetensors")
    return pooled @ head["weight"].T + head["bias"]


@pytest.mark.parametrize(
    ("method", "head"), [("fedit", "pooled"), ("fedit", "stock"), ("hilora", "pooled")]
)
def test_peft_and_load_give_the_runs_logits(
    method: str, head: str, vit: Path, pictures: Path, tmp_path: Path
) -> None:
    changes: dict[str, Any] = {
        "data": {"task": "classify-images", "max_length": 128},
        "method": {"name": method},
        "model": {"head": head, "name": str(vit)},
    }
    result = run(tiny_job(vit, pictures, **changes), tmp_path / "run")
    images = some()
    ours = result.client("site-1").model().logits(images)
    folder = tmp_path / "run" / "adapters" / "site-1"
    assert (ours - in_peft(vit, folder, images, head == "stock")).abs().max() <= 1e-5
    assert torch.equal(fg.load(folder).logits(images), ours)
    assert (
        result.client("site-1").evaluate()["accuracy"]
        == result.summary["clients"]["site-1"]["metric"]
    )
    result.client("site-1").export(tmp_path / "merged", merge=True)
    assert (fg.load(tmp_path / "merged").logits(images) - ours).abs().max() <= 1e-5
    assert (tmp_path / "merged" / "preprocessor_config.json").is_file()


def test_grove_vit_gives_the_same_logits_in_peft(pictures: Path, tmp_path: Path) -> None:
    from fedgrove.interop.models import resolve_name

    changes: dict[str, Any] = {
        "data": {"task": "classify-images", "max_length": 128},
        "model": {"name": "grove-vit"},
        "train": {"local_steps": 2, "lr": 1e-2},
        "method": {"name": "hilora"},
    }
    result = run(tiny_job(Path("grove-vit"), pictures, **changes), tmp_path / "run")
    images = some()
    ours = result.client("site-0").model().logits(images)
    folder = tmp_path / "run" / "adapters" / "site-0"
    base = Path(resolve_name("grove-vit"))
    assert (ours - in_peft(base, folder, images, stock=False)).abs().max() <= 1e-5
    (folder / "adapter_model.safetensors").write_bytes(
        (tmp_path / "run" / "adapters" / "site-1" / "adapter_model.safetensors").read_bytes()
    )
    assert (
        ours - in_peft(base, folder, images, stock=False)
    ).abs().max() > 1e-4  # another leaf, other logits


COMMON: dict[str, Any] = {
    "image_size": 16, "patch_size": 4, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "DeiT": COMMON,
    "Beit": COMMON,
    "Dinov2": COMMON,
    "SiglipVision": {**COMMON, "intermediate_size": 64},
    "Swin": {
        "image_size": 16,
        "patch_size": 2,
        "embed_dim": 16,
        "depths": [1, 1],
        "num_heads": [2, 2],
        "window_size": 2,
    },
    "CLIP": {},
    "ResNet": {
        "embedding_size": 8,
        "hidden_sizes": [8, 16],
        "depths": [1, 1],
        "layer_type": "basic",
    },
}
REFUSED = {
    "CLIP": r"\(CLIPConfig\) has no one hidden size for a head; choose an encoder of one part",
    "ResNet": r'lora\.targets = "auto" found no query and value layers in ResNetModel',
}


SLOW = ("DeiT", "Beit", "Dinov2")


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=pytest.mark.slow if kind in SLOW else ()) for kind in KINDS]
)
def test_encoders_of_other_kinds_run_or_are_refused_in_a_sentence(
    kind: str, pictures: Path, tmp_path: Path
) -> None:
    import transformers
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    settings = KINDS[kind]
    if kind == "CLIP":
        small = {
            "hidden_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 32,
        }
        settings = {"vision_config": COMMON, "text_config": {**small, "vocab_size": 64}}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(transformers, f"{kind}Model")(
            getattr(transformers, f"{kind}Config")(**settings)
        )
    model.save_pretrained(str(tmp_path / "model"))
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(str(tmp_path / "model"))
    job = tiny_job(
        tmp_path / "model",
        pictures,
        data={"task": "classify-images", "max_length": 128},
        run={"rounds": 1},
    )
    if kind in REFUSED:
        with pytest.raises(FedgroveError, match=REFUSED[kind]):
            run(job, tmp_path / "run")
        return
    if kind == "Swin":
        with pytest.raises(
            FedgroveError, match=r"train\.cohort = 2, but .* divides its images into windows"
        ):
            run(job.replace(train={"cohort": 2}), tmp_path / "run")
    result = run(job, tmp_path / "run")
    images = some()
    ours = result.client("site-1").model().logits(images)
    theirs = in_peft(
        tmp_path / "model", tmp_path / "run" / "adapters" / "site-1", images, stock=False
    )
    assert (ours - theirs).abs().max() <= 1e-5


def test_a_run_learns_and_answers_about_files(vit: Path, pictures: Path, tmp_path: Path) -> None:
    changes: dict[str, Any] = {
        "data": {"task": "classify-images", "max_length": 128},
        "train": {"local_steps": 10, "lr": 2e-2},
        "run": {"rounds": 4},
    }
    result = run(tiny_job(vit, pictures, **changes), tmp_path / "run")
    assert result.summary["task"] == "classify-images"
    assert result.summary["mean"] > 0.9
    files = sorted((pictures / "site-2").glob("*/*.png"))
    answers = result.client("site-0").predict([str(path) for path in files])
    assert (
        np.mean([answer == path.parent.name for answer, path in zip(answers, files, strict=True)])
        > 0.9
    )
    assert result.client("site-0").evaluate(pictures / "site-2")["examples"] == len(files)
    (tmp_path / "broken.png").write_bytes(files[0].read_bytes()[:60])
    with pytest.raises(FedgroveError, match=r"broken.png is not a readable image"):
        result.client("site-0").predict([tmp_path / "broken.png"])
