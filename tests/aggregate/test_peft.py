"""Adapters of plain PEFT, in and out: what PEFT computes with the result is what the rule says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fedgrove.aggregate import aggregate
from fedgrove.ground.errors import AdapterError

Deltas = dict[str, torch.Tensor]


def base(folder: Path) -> Any:
    from transformers import AutoModel

    return AutoModel.from_pretrained(str(folder))


def trained(bert: Path, folder: Path, seed: int, **config: Any) -> Deltas:
    """An adapter that PEFT made and saved, and the updates of the weights that PEFT computes with
    it.
    """
    from peft import LoraConfig, get_peft_model

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = get_peft_model(base(bert), LoraConfig(target_modules=["query", "value"], **config))
        for name, value in model.named_parameters():
            if "lora_B" in name:
                value.data.normal_()
    model.save_pretrained(str(folder))
    return deltas(model)


def deltas(model: Any) -> Deltas:
    return {
        name.removeprefix("base_model.model."): module.get_delta_weight("default").detach().clone()
        for name, module in model.named_modules()
        if hasattr(module, "get_delta_weight")
    }


def loaded(bert: Path, folder: Path) -> Deltas:
    from peft import PeftModel

    return deltas(PeftModel.from_pretrained(base(bert), str(folder)))


def same(found: Deltas, wanted: Deltas) -> None:
    assert found.keys() == wanted.keys()
    for site, value in wanted.items():
        assert (found[site] - value).norm() <= 1e-5 * value.norm()


@pytest.fixture
def clients(tiny_bert: Path, tmp_path: Path) -> tuple[list[Path], list[Deltas]]:
    """Mixed ranks and alphas, some of them by site."""
    configs: list[dict[str, Any]] = [
        {"r": 2, "lora_alpha": 4},
        {"r": 4, "lora_alpha": 2, "rank_pattern": {"layer.1.attention.self.value": 3}},
        {"r": 3, "lora_alpha": 6, "alpha_pattern": {"query": 5}, "task_type": "FEATURE_EXTRACTION"},
    ]
    folders = [tmp_path / "in" / f"site-{n}" for n in range(3)]
    return folders, [
        trained(tiny_bert, folder, n, **c)
        for n, (folder, c) in enumerate(zip(folders, configs, strict=True))
    ]


def mean(each: list[Deltas]) -> Deltas:
    return {
        site: torch.stack([one[site].double() for one in each]).mean(0).float() for site in each[0]
    }


def test_flora_in_peft_is_the_mean_of_the_updates(
    clients: Any, tiny_bert: Path, tmp_path: Path
) -> None:
    folders, each = clients
    aggregate("flora", folders, tmp_path / "out")
    same(loaded(tiny_bert, tmp_path / "out" / "_global"), mean(each))
    config = json.loads((tmp_path / "out" / "_global" / "adapter_config.json").read_text())
    assert sorted(config["target_modules"]) == ["query", "value"]
    assert config["base_model_name_or_path"] == str(tiny_bert)
    assert config["r"] == 9
    assert config["rank_pattern"] == {"encoder.layer.1.attention.self.value": 8}
    stored = load_file(tmp_path / "out" / "_global" / "adapter_model.safetensors")
    assert {value.dtype for value in stored.values()} == {torch.float32}


@pytest.mark.parametrize("method", ["flexlora", "hilora", "raflora"])
def test_each_client_can_load_its_own(
    method: str, clients: Any, tiny_bert: Path, tmp_path: Path
) -> None:
    folders, each = clients
    aggregate(method, folders, tmp_path / "out", rank=16)
    wanted = {}
    for number, (folder, own) in enumerate(zip(folders, each, strict=True)):
        found = loaded(tiny_bert, tmp_path / "out" / folder.name)
        config = json.loads((tmp_path / "out" / folder.name / "adapter_config.json").read_text())
        assert config["r"] == [2, 4, 3][number]
        for site, value in found.items():
            rank = (
                3 if number == 1 and site.endswith("layer.1.attention.self.value") else config["r"]
            )
            assert torch.linalg.matrix_rank(value, rtol=1e-5) == rank
        assert found.keys() == own.keys()
    if method != "raflora":
        wanted = mean(each)
        same(loaded(tiny_bert, tmp_path / "out" / "_global"), wanted)


def test_a_bfloat16_adapter_is_averaged_in_float32(tiny_bert: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    folders = [tmp_path / f"site-{n}" for n in range(2)]
    each: list[Any] = []
    for n, folder in enumerate(folders):
        trained(tiny_bert, folder, n, r=2, lora_alpha=2)
        path = folder / "adapter_model.safetensors"
        each.append({name: value.bfloat16() for name, value in load_file(path).items()})
        save_file(each[-1], path)
    aggregate("fedit", folders, tmp_path / "out")
    for name, value in load_file(
        tmp_path / "out" / "_global" / "adapter_model.safetensors"
    ).items():
        assert value.dtype == torch.float32
        assert torch.equal(value, ((each[0][name].double() + each[1][name].double()) / 2).float())


def classifiers(bert: Path, folder: Path, labels: list[int]) -> tuple[list[Path], list[Any]]:
    """Classifiers of transformers that PEFT trained and saved, their heads among the modules."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification

    folders, models = [], []
    for number, count in enumerate(labels):
        model = AutoModelForSequenceClassification.from_pretrained(str(bert), num_labels=count)
        config = LoraConfig(r=2, lora_alpha=2, target_modules=["query"], task_type="SEQ_CLS")
        peft = get_peft_model(model, config)
        for name, value in peft.named_parameters():
            if "lora_B" in name or "modules_to_save" in name:
                value.data.normal_()
        folders.append(folder / f"site-{number}")
        peft.save_pretrained(str(folders[-1]))
        models.append(peft)
    return folders, models


def test_heads_are_averaged_and_the_auto_class_loads_them(tiny_bert: Path, tmp_path: Path) -> None:
    from peft import AutoPeftModelForSequenceClassification

    folders, models = classifiers(tiny_bert, tmp_path, [2, 2])
    done = aggregate("fedex-lora", folders, tmp_path / "out", weights="1,3")
    assert "Averaged beside the adapters: classifier.bias, classifier.weight." in done.notes
    config = json.loads((tmp_path / "out" / "_global" / "adapter_config.json").read_text())
    assert "classifier" in config["modules_to_save"]
    assert config["task_type"] == "SEQ_CLS"
    found = AutoPeftModelForSequenceClassification.from_pretrained(
        str(tmp_path / "out" / "_global")
    )
    heads = [each.base_model.model.classifier.modules_to_save["default"].weight for each in models]
    wanted = heads[0] / 4 + 3 * heads[1] / 4
    head = found.base_model.model.classifier.modules_to_save["default"].weight
    assert torch.allclose(head, wanted, atol=1e-6)
    parts = zip(deltas(models[0]).items(), deltas(models[1]).values(), strict=True)
    same(deltas(found), {site: one / 4 + 3 * other / 4 for (site, one), other in parts})


def test_heads_of_other_shapes_are_left_out_and_said(tiny_bert: Path, tmp_path: Path) -> None:
    folders, _ = classifiers(tiny_bert, tmp_path, [2, 3])
    done = aggregate("fedex-lora", folders, tmp_path / "out")
    assert any("not every client has it in one shape: classifier" in note for note in done.notes)
    config = json.loads((tmp_path / "out" / "_global" / "adapter_config.json").read_text())
    assert config["modules_to_save"] is None
    assert config["task_type"] is None


def test_heads_of_classes_in_another_order_are_not_averaged(
    tiny_bert: Path, tmp_path: Path
) -> None:
    """The order stands in a model's configuration beside the adapter, where a tool left one."""
    folders, _ = classifiers(tiny_bert, tmp_path, [2, 2])
    for folder, names in zip(folders, (["no", "yes"], ["yes", "no"]), strict=True):
        table = {str(number): name for number, name in enumerate(names)}
        (folder / "config.json").write_text(json.dumps({"id2label": table}))
    done = aggregate("fedit", folders, tmp_path / "out")
    assert done.notes == (
        "Heads were left out, because the clients' classes differ: no, yes and yes, no.",
    )
    unnamed = {"0": "LABEL_0", "1": "LABEL_1"}
    (folders[1] / "config.json").write_text(json.dumps({"id2label": unnamed}))
    done = aggregate("fedit", folders, tmp_path / "other")
    assert any(note.startswith("Averaged") for note in done.notes)


def test_a_head_with_nan_is_refused_by_its_name(tiny_bert: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    folders, _ = classifiers(tiny_bert, tmp_path, [2, 2])
    file = folders[1] / "adapter_model.safetensors"
    tensors = load_file(file)
    (name,) = [each for each in tensors if each.endswith("classifier.weight")]
    tensors[name][0, 0] = float("nan")
    save_file(tensors, file)
    with pytest.raises(AdapterError, match=f"'{name}' holds NaN or Inf; leave this client out"):
        aggregate("fedit", folders, tmp_path / "out")


def test_heads_may_be_left_out(tiny_bert: Path, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    folders, models = classifiers(tiny_bert, tmp_path, [2, 2])
    aggregate("fedex-lora", folders, tmp_path / "out", options=["heads=leave"])
    config = json.loads((tmp_path / "out" / "_global" / "adapter_config.json").read_text())
    assert config["modules_to_save"] is None
    model = AutoModelForSequenceClassification.from_pretrained(str(tiny_bert))
    found = PeftModel.from_pretrained(model, str(tmp_path / "out" / "_global"))
    same(deltas(found), mean([deltas(each) for each in models]))


WRAPS = {
    "compiled": lambda name: f"_orig_mod.{name}",
    "compiled inside": lambda name: name.replace(
        "base_model.model.", "base_model.model._orig_mod."
    ),
    "a layer compiled": lambda name: name.replace("layer.0.", "layer.0._orig_mod."),
    "data parallel": lambda name: f"module.{name}",
    "data parallel inside": lambda name: name.replace(
        "base_model.model.", "base_model.model.module."
    ),
    "sharded": lambda name: name.replace("layer.1.", "layer.1._fsdp_wrapped_module."),
    "checkpointed": lambda name: name.replace(
        ".attention.", "._checkpoint_wrapped_module.attention."
    ),
    "data parallel deep inside": lambda name: name.replace("layer.0.", "layer.0.module."),
    "compiled and data parallel": lambda name: f"_orig_mod.module._orig_mod.{name}",
    "inside another model": lambda name: f"model.{name}",
    "a whole checkpoint": lambda name: f"state_dict.model._orig_mod.{name}",
    "lightning": lambda name: f"_forward_module.{name}",
    "bare": lambda name: name.removeprefix("base_model.model."),
    "twice": lambda name: f"base_model.model.{name}",
    "default": lambda name: name.replace(".weight", ".default.weight"),
}


def rename(folder: Path, change: Any) -> None:
    from safetensors.torch import save_file

    file = folder / "adapter_model.safetensors"
    tensors = {change(name): value.clone() for name, value in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize("wrap", WRAPS)
def test_wrapped_names_give_an_adapter_that_lives(
    wrap: str, tiny_bert: Path, tmp_path: Path
) -> None:
    folders = [tmp_path / f"site-{n}" for n in range(2)]
    each = [trained(tiny_bert, f, n, r=2, lora_alpha=4) for n, f in enumerate(folders)]
    for folder in folders:
        rename(folder, WRAPS[wrap])
    aggregate("fedex-lora", folders, tmp_path / "out")
    same(loaded(tiny_bert, tmp_path / "out" / "_global"), mean(each))


def test_an_unknown_wrapper_is_refused_by_name(tiny_bert: Path, tmp_path: Path) -> None:
    trained(tiny_bert, tmp_path / "one", 0, r=2, lora_alpha=4)
    rename(tmp_path / "one", lambda name: name.replace("layer.0.", "layer.0._my_wrapper."))
    with pytest.raises(AdapterError, match="'_my_wrapper' of a wrapper that is not known here"):
        aggregate("fedit", [tmp_path / "one"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


FOREIGN = {
    "a wrapper without an underscore": (
        lambda name: name.replace("layer.0.", "layer.0.student."),
        "'base_model.model.encoder.layer.0.student.attention.self.query.lora_A.weight' is of no "
        "layer of",
    ),
    "the encoder of a classifier": (
        lambda name: name.replace("base_model.model.", "base_model.model.bert."),
        "there it is 'encoder.layer.0.attention.self.query'",
    ),
    "around another adapter": (
        lambda name: name.replace(".query.", ".query.base_layer."),
        "was trained around another adapter",
    ),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_what_names_no_layer_of_a_base_that_is_here_is_refused(
    case: str, tiny_bert: Path, tmp_path: Path
) -> None:
    """PEFT would load each of them without an error, and they would do nothing."""
    change, words = FOREIGN[case]
    folders = [tmp_path / "one", tmp_path / "two"]
    for number, folder in enumerate(folders):
        trained(tiny_bert, folder, number, r=2, lora_alpha=4, task_type="FEATURE_EXTRACTION")
        rename(folder, change)
    with pytest.raises(AdapterError, match=r"one/adapter_model\.safetensors") as caught:
        aggregate("fedit", folders, tmp_path / "out")
    assert words in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_the_classifiers_own_names_are_layers_too(tiny_bert: Path, tmp_path: Path) -> None:
    """With no task said, any class that the base can be loaded with may be meant."""
    folders, _ = classifiers(tiny_bert, tmp_path, [2, 2])
    for folder in folders:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "task_type": None}))
    assert aggregate("fedit", folders, tmp_path / "out").adapters == ("_global",)


def test_targets_that_would_miss_a_site_are_named_in_full(tiny_bert: Path, tmp_path: Path) -> None:
    """Saved for layer 0 alone by the configuration, but with factors of both layers in the file."""
    wanted = trained(tiny_bert, tmp_path / "one", 0, r=2, lora_alpha=4)
    path = tmp_path / "one" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "layers_to_transform": [0]}))
    aggregate("fedit", [tmp_path / "one"], tmp_path / "out")
    same(loaded(tiny_bert, tmp_path / "out" / "_global"), wanted)


def test_rslora_is_a_scale(tiny_bert: Path, tmp_path: Path) -> None:
    folders = [tmp_path / "one", tmp_path / "two"]
    each = [
        trained(tiny_bert, f, n, r=4, lora_alpha=4, use_rslora=True) for n, f in enumerate(folders)
    ]
    aggregate("fedex-lora", folders, tmp_path / "out")
    same(loaded(tiny_bert, tmp_path / "out" / "_global"), mean(each))


def test_one_base_under_two_paths(tiny_bert: Path, tmp_path: Path) -> None:
    folders = [tmp_path / "one", tmp_path / "two"]
    for number, folder in enumerate(folders):
        trained(tiny_bert, folder, number, r=2, lora_alpha=4)
    path = folders[1] / "adapter_config.json"
    elsewhere = {"base_model_name_or_path": f"somewhere/else/{tiny_bert.name}"}
    path.write_text(json.dumps({**json.loads(path.read_text()), **elsewhere}))
    done = aggregate("fedit", folders, tmp_path / "out")
    assert any("one base model under several names" in note for note in done.notes)
    for number, name in enumerate(
        (
            f"C:\\\\models\\\\{tiny_bert.name}",
            f"/hub/models--Org--{tiny_bert.name}/snapshots/0a1b",
            f"Org/{tiny_bert.name.upper()}",
        )
    ):
        path.write_text(
            json.dumps(
                {
                    **json.loads(path.read_text()),
                    "base_model_name_or_path": name,
                    "revision": "main",
                }
            )
        )
        aggregate("fedit", folders, tmp_path / f"out-{number}")
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": None}))
    with pytest.raises(AdapterError, match=r"names no base model .*--base"):
        aggregate("fedit", folders, tmp_path / "other")
    path.write_text(
        json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": "my-base"})
    )
    with pytest.raises(AdapterError, match="--base"):
        aggregate("fedit", folders, tmp_path / "other")
    aggregate("fedit", folders, tmp_path / "named", base=str(tiny_bert))
    config = json.loads((tmp_path / "named" / "_global" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tiny_bert)


def test_different_ways_to_name_the_same_sites(tiny_bert: Path, tmp_path: Path) -> None:
    """One tool says which layers by patterns, the other by full names: the output names them in
    full.
    """
    one, two = tmp_path / "one", tmp_path / "two"
    each = [
        trained(tiny_bert, one, 0, r=2, lora_alpha=2),
        trained(tiny_bert, two, 1, r=2, lora_alpha=2),
    ]
    path = two / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "target_modules": sorted(each[0])}))
    aggregate("fedex-lora", [one, two], tmp_path / "out")
    config = json.loads((tmp_path / "out" / "_global" / "adapter_config.json").read_text())
    assert config["target_modules"] == sorted(each[0])
    same(loaded(tiny_bert, tmp_path / "out" / "_global"), mean(each))
