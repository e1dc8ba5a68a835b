from __future__ import annotations

from array import array
from typing import TYPE_CHECKING, Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from torch.nn import functional as F

from fedgrove.federation.tasks import ClassifyText, Task
from fedgrove.ground.errors import DataError
from fedgrove.ground.seeds import generator

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Words "w0" ... "w9" are the ids 3 ... 12 between a start (1) and an end (2)."""
    from transformers import PreTrainedTokenizerFast

    words = ["[PAD]", "[CLS]", "[SEP]", *(f"w{i}" for i in range(10))]
    inner = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="[PAD]"))
    inner.pre_tokenizer = Whitespace()
    inner.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="[PAD]", model_max_length=6)


@pytest.fixture
def task() -> ClassifyText:
    return ClassifyText(("no", "yes", "maybe"), max_length=5)


ROWS = [{"text": "w0 w1 w2 w3 w4 w5 w6", "label": "maybe"}, {"text": "w9", "label": "no"}]


def test_it_is_a_task(task: ClassifyText) -> None:
    as_task: Task = task
    assert (as_task.name, as_task.metric) == ("classify-text", "accuracy")


def test_encoding_cuts_and_keeps_special_tokens(
    task: ClassifyText, tokenizer: PreTrainedTokenizerFast
) -> None:
    assert task.encode(ROWS, tokenizer) == [
        {"input_ids": array("i", [1, 3, 4, 5, 2]), "label": 2},
        {"input_ids": array("i", [1, 12, 2]), "label": 0},
    ]
    assert task.encode([{"text": "w9"}], tokenizer) == [{"input_ids": array("i", [1, 12, 2])}]
    assert task.encode([], tokenizer) == []
    with pytest.raises(
        DataError,
        match="row 2 has the label 'never', but the model knows only: 'no', 'yes', 'maybe'",
    ):
        task.encode([ROWS[0], {"text": "w1", "label": "never"}], tokenizer)


def test_the_number_of_cut_texts(task: ClassifyText, tokenizer: PreTrainedTokenizerFast) -> None:
    exact = {"text": "w1 w2 w3"}  # five tokens with the special ones
    assert task.truncated([*ROWS, exact, ROWS[0]], tokenizer) == 2
    assert task.truncated([], tokenizer) == 0


def test_a_batch_is_padded_to_its_own_longest(
    task: ClassifyText, tokenizer: PreTrainedTokenizerFast
) -> None:
    examples = task.encode(ROWS, tokenizer)
    batch = task.collate(examples, pad_id=7)
    assert batch["input_ids"].tolist() == [[1, 3, 4, 5, 2], [1, 12, 2, 7, 7]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]
    assert batch["labels"].tolist() == [2, 0]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}
    assert task.collate(examples[1:], pad_id=7)["input_ids"].shape == (1, 3)
    assert "labels" not in task.collate(task.encode([{"text": "w9"}], tokenizer), pad_id=7)


def test_a_new_head_is_small_and_seeded(task: ClassifyText) -> None:
    head = ClassifyText(tuple(map(str, range(50)))).new_head(400, generator(0, "head"))
    assert head["weight"].shape == (50, 400)
    assert head["weight"].std().item() == pytest.approx(0.02, rel=0.05)
    assert head["bias"].tolist() == [0.0] * 50
    again = task.new_head(8, generator(0, "head"))
    assert torch.equal(again["weight"], task.new_head(8, generator(0, "head"))["weight"])
    assert not torch.equal(again["weight"], task.new_head(8, generator(1, "head"))["weight"])


def test_pooling_is_the_mean_without_padding(task: ClassifyText) -> None:
    states = torch.tensor([[[1.0, 2.0], [3.0, 6.0], [100.0, 100.0]]])
    assert task.pool(states, {"attention_mask": torch.tensor([[1, 1, 0]])}).tolist() == [[2.0, 4.0]]
    mask = {"attention_mask": torch.ones(1, 3, dtype=torch.long)}
    assert task.pool(states.bfloat16(), mask).dtype == torch.float32
    assert task.pool(states.double(), mask).dtype == torch.float64
    assert task.pool(states, {"attention_mask": torch.zeros(1, 3, dtype=torch.long)}).tolist() == [
        [0.0, 0.0]
    ]


def test_padding_changes_nothing(task: ClassifyText) -> None:
    states = torch.randn(2, 4, 6, generator=generator(0, "states"), dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    both = task.pool(states, {"attention_mask": mask})
    alone = task.pool(states[1:, :2], {"attention_mask": mask[1:, :2]})
    torch.testing.assert_close(both[1:], alone, rtol=0, atol=1e-15)


def test_logits_have_the_heads_dtype(task: ClassifyText) -> None:
    head = {
        "weight": torch.eye(3, 2, dtype=torch.float64),
        "bias": torch.tensor([0.0, 0.0, 5.0], dtype=torch.float64),
    }
    logits = task.head_logits(torch.tensor([[1.0, 2.0]]), head)
    assert logits.tolist() == [[1.0, 2.0, 5.0]]
    assert logits.dtype == torch.float64


def test_loss_and_scores_agree_and_add_up(task: ClassifyText) -> None:
    logits = torch.randn(7, 3, generator=generator(0, "logits"), dtype=torch.float64)
    batch = {"labels": torch.tensor([0, 1, 2, 0, 1, 2, 0])}
    sums = [
        task.score(logits[part], {"labels": batch["labels"][part]})
        for part in (slice(0, 3), slice(3, 7))
    ]
    measured = task.measure({key: sum(part[key] for part in sums) for key in sums[0]})
    assert measured["loss"] == pytest.approx(task.loss(logits, batch).item(), abs=1e-12)
    assert measured["loss"] == pytest.approx(
        F.nll_loss(logits.log_softmax(-1), batch["labels"]).item(), abs=1e-12
    )
    assert measured["accuracy"] == pytest.approx(
        (logits.argmax(1) == batch["labels"]).double().mean().item()
    )
    assert measured["examples"] == 7


@pytest.fixture(scope="module")
def pair_tokenizer(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """As BERT does it: the second text's tokens are of the second kind."""
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    inner.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 1), ("[SEP]", 2)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="[PAD]",
        model_max_length=16,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def test_pairs_are_read_encoded_and_batched(pair_tokenizer: PreTrainedTokenizerFast) -> None:
    from fedgrove.job import Job

    data: Any = Job.parse("").override(["data.pair=claim"]).data
    assert ClassifyText.columns(data) == ["text", "claim", "label"]
    with_pair = ClassifyText.row({"text": "w0 w1", "claim": "w2", "label": "no"}, data, "row 1")
    alone = ClassifyText.row({"text": "w3", "claim": "", "label": "yes"}, data, "row 2")
    assert with_pair == {"text": "w0 w1", "pair": "w2", "label": "no"}
    assert "pair" not in alone

    task = ClassifyText(("no", "yes"), max_length=16)
    first, second = task.encode([with_pair, alone], pair_tokenizer)
    assert list(first["input_ids"]) == [1, 3, 4, 2, 5, 2]
    assert list(first["token_type_ids"]) == [0, 0, 0, 0, 1, 1]
    assert second == {"input_ids": array("i", [1, 6, 2]), "label": 1}
    batch = task.collate([first, second], pad_id=0)
    assert batch["token_type_ids"].tolist() == [[0, 0, 0, 0, 1, 1], [0] * 6]
    assert set(task.inputs(batch)) == {"input_ids", "attention_mask", "token_type_ids"}
    assert set(task.inputs(task.collate([second], pad_id=0))) == {"input_ids", "attention_mask"}
    assert (
        ClassifyText(("no", "yes"), max_length=5).truncated([with_pair, alone], pair_tokenizer) == 1
    )
