"""Every job file: valid, and where it names a model of the hub, sound against that model's
published shapes.

No weights there: the architectures are built on the meta device from the sizes that their papers
give. The small jobs run for two rounds each, on the embedded models and data.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import fedgrove as fg
from fedgrove.federation.tasks import task_class, task_name
from fedgrove.interop.models import longest_input, model_class
from fedgrove.interop.targets import find_sites
from fedgrove.job import Job
from fedgrove.job.sections import EMBEDDED_MODELS
from fedgrove.methods.contract import ClientInfo, Setting
from fedgrove.methods.registry import method_class

#: HiLoRA trains root, cluster and leaf one after another: nothing less is a run
FEWEST_ROUNDS = {"hilora": 3}

FILES = sorted((Path(__file__).parents[1] / "jobs").glob("*.toml"))

#: hub model -> its configuration class and published sizes, and what its layers' query and value
#: have: (in, out) each
PUBLISHED: dict[str, tuple[str, dict[str, Any]]] = {
    "roberta-large": (
        "RobertaConfig",
        {
            "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096,
            "max_position_embeddings": 514, "vocab_size": 50265,
        },
    ),
    "google-bert/bert-base-uncased": (
        "BertConfig",
        {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "max_position_embeddings": 512},
    ),
    "meta-llama/Llama-2-7b-hf": (
        "LlamaConfig",
        {
            "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "intermediate_size": 11008,
            "max_position_embeddings": 4096, "vocab_size": 32000,
        },
    ),
    "meta-llama/Llama-3.2-1B": (
        "LlamaConfig",
        {
            "hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8,
            "intermediate_size": 8192, "max_position_embeddings": 131072, "vocab_size": 128256,
        },
    ),
    "google/vit-base-patch16-224-in21k": (
        "ViTConfig",
        {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "image_size": 224, "patch_size": 16},
    ),
}  # fmt: skip


#: Those that run here: twins of published settings, and the fields of the study of evidence.
SMALL = [file for file in FILES if file.stem.endswith("-small") or "evidence" in file.stem]


@pytest.mark.parametrize("file", FILES, ids=lambda path: path.stem)
def test_the_job_is_valid_and_fits_its_model(file: Path) -> None:
    job = Job.load(file).resolved()
    small = file in SMALL
    assert small == (job.model.name in EMBEDDED_MODELS), "a twin runs without a hub"
    assert job.data.source in ("embedded", "made") or not small
    if small:
        return
    assert job.model.name in PUBLISHED, f"{job.model.name}: add its published sizes to this test"
    kind, sizes = PUBLISHED[job.model.name]
    config = getattr(transformers, kind)(**sizes)
    limit = longest_input(config)
    assert limit is None or job.data.max_length <= limit
    head = job.model.head if task_class(job.data).classifies else "lm"
    with torch.device("meta"):
        model = model_class(task_name(job.data), head).from_config(config)
    sites = find_sites(model, job.lora.targets)
    assert {site.layer for site in sites.values()} == set(range(config.num_hidden_layers))
    assert all(site.in_features == config.hidden_size for site in sites.values())
    names = [f"client-{i}" for i in range(job.federation.clients)]
    ranks = job.ranks(names)
    clients = [ClientInfo(name, ranks[name], 100) for name in names]
    chosen = method_class(job.method.name)
    assert chosen.ranks == "mixed" or len(set(ranks.values())) == 1
    rank = job.lora.rank or 1
    setting = Setting(
        sites,
        rank,
        float(job.lora.alpha or 2 * rank),
        job.run.rounds,
        job.run.seed,
        job.lora.scaling,
    )
    method = chosen(job.method.options, setting)
    method.check(clients)
    text = file.read_text(encoding="utf-8")
    assert ("assumed" in text and "arXiv" in text) or "methods.md" in text, (
        "a published setting names its source"
    )


def test_every_published_job_has_a_small_twin_it_names() -> None:
    stems = {file.stem for file in FILES}
    for file in FILES:
        if file not in SMALL:
            text = file.read_text(encoding="utf-8")
            assert any(f"{stem}.toml" in text for stem in stems if stem.endswith("-small")), (
                file.name
            )


@pytest.mark.slow
@pytest.mark.parametrize("file", SMALL, ids=lambda path: path.stem)
def test_a_small_job_runs_two_rounds(file: Path, tmp_path: Path) -> None:
    """Through the public API: clients as the job has them, a report, an adapter that gives the
    run's measure again.

    Clients train on all that the job gives them; they are measured on less, and a newcomer is tuned
    for one epoch.
    """
    job = Job.load(file)
    rounds = FEWEST_ROUNDS.get(job.method.name, 2)
    shorter = ["data.test_examples=30"]
    if task_name(job.data) == "generate":
        shorter.append("data.generate_examples=2")
    if job.train.final_local_epochs:
        shorter.append("train.final_local_epochs=1")
    job = job.override(
        [f"run.rounds={rounds}", f"run.eval_every={rounds}", "train.threads=1", *shorter]
    )
    result = fg.run(job, tmp_path / "run")
    summary, lines = result.summary, result.metrics()
    clients = (
        job.federation.clients if job.data.partition.by != "natural" else len(job.data.groups or ())
    )
    share = job.federation.held_out
    assert isinstance(share, float)
    trained = {name: row for name, row in summary["clients"].items() if not row.get("held_out")}
    assert len(summary["clients"]) == clients
    assert len(trained) == clients - round(clients * share)
    assert {line["round"] for line in lines if line["split"] == "train"} == set(
        range(1, rounds + 1)
    )
    assert all(
        math.isfinite(row["metric"]) and math.isfinite(row["loss"])
        for row in summary["clients"].values()
    )
    if share:
        assert summary["unseen"]["clients"] == clients - len(trained)
        late = [row for name, row in summary["clients"].items() if name not in trained]
        assert all(row["metric_tuned"] is not None for row in late)
    page = result.report.read_text(encoding="utf-8")
    assert page.count("<img") + page.count("<svg") >= 3
    assert "What the models write" in page or summary["task"] != "generate"
    assert {path.name for path in (tmp_path / "run" / "adapters").iterdir()} >= set(
        summary["clients"]
    )
    name = min(trained)
    measures = result.client(name).evaluate()
    assert measures[summary["metric"]] == pytest.approx(trained[name]["metric"], abs=1e-6)
    assert (result.client(name).path / "adapter_config.json").exists()
