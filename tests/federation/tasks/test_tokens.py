"""Entities: how they are written, where their words' tokens stand, and what is measured."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from seqeval.metrics import f1_score, precision_score, recall_score
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast

from fedgrove.federation.metrics import asked, measures
from fedgrove.federation.tasks.tokens import NOWHERE, Tokens, TokensOptions
from fedgrove.ground.errors import DataError

TASK = Tokens(("DRUG", "DOSE"), max_length=12)
DATA = TokensOptions()
TAGGED = TokensOptions(words="tokens", tags="ner_tags")
TEXT = "On Nubrex 20mg, daily."
SPANS = [[3, 9, "DRUG"], [10, 14, "DOSE"]]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Pieces of at most three letters: "Nubrex" is two tokens, "20mg" is "20m", "g"."""
    letters = "abcdefghijklmnopqrstuvwxyzONRx0123456789,.-"
    inner = Tokenizer(models.WordPiece(_pieces(letters), unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]")


def _pieces(letters: str) -> dict[str, int]:
    names = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "Nub", "20m", *letters]
    names += [f"##{each}" for each in ["rex", *letters]]
    return {name: number for number, name in enumerate(dict.fromkeys(names))}


def test_words_are_read_at_their_first_tokens(tokenizer: Any) -> None:
    row = TASK.row({"text": TEXT, "spans": SPANS}, DATA, "here")
    words = [TEXT[start:end] for start, end in row["words"]]
    assert words == ["On", "Nubrex", "20", "mg", ",", "daily", "."]
    (example,) = TASK.encode([row], tokenizer)
    tokens = tokenizer.convert_ids_to_tokens(example["input_ids"])
    assert tokens == [
        "[CLS]",
        "O",
        "##n",
        "Nub",
        "##rex",
        "20m",
        "##g",
        "##,",
        "d",
        "##a",
        "##i",
        "[SEP]",
    ]
    # "mg" begins within the token of "20"; the text is cut before its last sign
    assert example["places"] == [1, 3, 5, 5, 7, 8, NOWHERE]
    tags = [TASK.output_names[number] for number in example["label"]]
    assert tags == ["O", "B-DRUG", "B-DOSE", "I-DOSE", "O", "O", "O"]


def test_the_loss_is_of_words_with_a_token_of_their_own(tokenizer: Any) -> None:
    given = [{"text": TEXT, "spans": SPANS}, {"text": "On 20mg", "spans": [[3, 7, "DOSE"]]}]
    examples = TASK.encode([TASK.row(each, DATA, "here") for each in given], tokenizer)
    batch = TASK.collate(examples, 0)
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 12, 5, generator=draw, dtype=torch.float64)
    at = [(0, 1, 0), (0, 3, 1), (0, 5, 3), (0, 7, 0), (0, 8, 0), (1, 1, 0), (1, 3, 3)]
    dense = [-F.log_softmax(logits[row, token], -1)[tag] for row, token, tag in at]
    assert float(TASK.loss(logits, batch)) == pytest.approx(float(torch.stack(dense).mean()))
    alone = [
        TASK.loss(logits[i : i + 1], {k: v[i : i + 1] for k, v in batch.items()}) for i in (0, 1)
    ]
    assert float(alone[1]) == pytest.approx(float(torch.stack(dense[5:]).mean()))


def test_entities_are_counted_as_seqeval_counts_them(tokenizer: Any) -> None:
    given = [{"text": TEXT, "spans": SPANS}, {"text": "On 20mg", "spans": [[3, 7, "DOSE"]]}] * 6
    examples = TASK.encode([TASK.row(each, DATA, "here") for each in given], tokenizer)
    batch = TASK.collate(examples, 0)
    logits = torch.randn(12, 12, 5, generator=torch.Generator().manual_seed(1))
    # half of the rows are answered rightly
    for row in range(0, 12, 2):
        for place, tag in zip(examples[row]["places"], examples[row]["label"], strict=True):
            if place != NOWHERE and tag != 4:
                logits[row, place, tag] += 20
    answers = TASK.compared(logits, examples)
    assert answers.truth is not None
    assert answers.predicted is not None
    pair = list(answers.truth), list(answers.predicted)
    assert 0 < f1_score(*pair) < 1
    found = TASK.measure(TASK.score(logits, batch))
    assert found["entity_f1"] == pytest.approx(f1_score(*pair))
    full = measures([*asked(TASK), "entity_f1"], answers)
    assert full["entity_f1"] == pytest.approx(f1_score(*pair))
    assert full["entity_precision"] == pytest.approx(precision_score(*pair))
    assert full["entity_recall"] == pytest.approx(recall_score(*pair))
    assert set(full["entity_f1_by_type"]) == {"DRUG", "DOSE"}


@pytest.mark.parametrize(
    ("tags", "spans"),
    [
        (["O", "B-DRUG", "I-DRUG", "B-DOSE"], [[2, 6, "DRUG"], [7, 9, "DOSE"]]),
        (["O", "B-DRUG", "B-DRUG", "O"], [[2, 3, "DRUG"], [4, 6, "DRUG"]]),
        (["I-DRUG", "I-DRUG", "O", "O"], [[0, 3, "DRUG"]]),
        (["O", "B-DRUG", "E-DRUG", "S-DOSE"], [[2, 6, "DRUG"], [7, 9, "DOSE"]]),
        (["O", "B-DRUG", "L-DRUG", "U-DOSE"], [[2, 6, "DRUG"], [7, 9, "DOSE"]]),
        (["O", "DRUG", "DRUG", "DOSE"], [[2, 6, "DRUG"], [7, 9, "DOSE"]]),
        ("O B-DRUG I-DRUG O", [[2, 6, "DRUG"]]),
        ('["O", "B-DRUG", "I-DRUG", "O"]', [[2, 6, "DRUG"]]),
        (["O", "O", "O", "O"], []),
    ],
)
def test_tags_of_every_scheme(tags: Any, spans: list[Any]) -> None:
    row = TASK.row({"tokens": ["a", "b", "cd", "ef"], "ner_tags": tags}, TAGGED, "here")
    assert row["text"] == "a b cd ef"
    assert row["spans"] == spans


def test_numbers_for_tags_need_names() -> None:
    values = {"tokens": "a b", "ner_tags": [0, 1]}
    with pytest.raises(DataError, match=r"has the number 0 for a tag; name .* data\.tag_names"):
        TASK.row(values, TAGGED, "here")
    named = TokensOptions(words="tokens", tags="ner_tags", tag_names=("O", "B-DRUG"))
    assert TASK.row(values, named, "here")["spans"] == [[2, 3, "DRUG"]]


@pytest.mark.parametrize(
    ("spans", "words"),
    [
        ([[3, 3, "DRUG"]], "the span 3 to 3 is empty"),
        ([[2, 3, "DRUG"]], "the span 2 to 3 is empty"),
        ([[3, 9, "DRUG"], [5, 14, "DOSE"]], r"3 to 9 \('Nubrex'\) and .* overlap"),
        ([[3, 9, "DRUG"], [3, 9, "DOSE"]], "overlap"),
        ([[3, 7, "DRUG"]], r"\('Nubr'\) ends inside a word"),
        ([[4, 9, "DRUG"]], r"\('ubrex'\) begins inside a word"),
        ([[3, 99, "DRUG"]], "3 to 99 is not in the text, which has 22 characters"),
        ([[3, 9]], "which is no span"),
        ([{"start": "3", "end": 9, "label": "DRUG"}], "which is no span"),
        ([[3, 9, None]], "is empty"),
        ("DRUG", "is no list of spans"),
        (None, "is no list of spans"),
    ],
)
def test_spans_that_are_none_are_refused_by_row(spans: Any, words: str) -> None:
    with pytest.raises(DataError, match=f"^here: .*{words}"):
        TASK.row({"text": TEXT, "spans": spans}, DATA, "here")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"tokens": ["a", "b"], "ner_tags": ["O"]}, "has 2 words, but the column 'ner_tags' has 1"),
        ({"tokens": [], "ner_tags": []}, "has no words"),
        ({"tokens": ["a", ""], "ner_tags": ["O", "O"]}, "word 2 of the column 'tokens' is ''"),
        ({"tokens": ["a"], "ner_tags": ["B"]}, "the tag 'B' has no type; write B-TYPE"),
    ],
)
def test_words_and_tags_that_do_not_fit(values: Any, words: str) -> None:
    with pytest.raises(DataError, match=words):
        TASK.row(values, TAGGED, "here")


def test_white_space_at_a_spans_ends_is_left_out() -> None:
    row = TASK.row({"text": TEXT, "spans": [[2, 10, "DRUG"]]}, DATA, "here")
    assert row["spans"] == [[3, 9, "DRUG"]]


def test_an_unknown_type_and_half_of_the_columns() -> None:
    with pytest.raises(DataError, match="row 4: the entity type 'SITE' is none of 'DRUG', 'DOSE'"):
        TASK.target({"text": "x", "words": [[0, 1]], "spans": [[0, 1, "SITE"]]}, 4)
    with pytest.raises(ValueError, match=r"data.words and data.tags go together"):
        TokensOptions(words="tokens")


def test_answers_are_entities_in_the_text(tokenizer: Any) -> None:
    (example,) = TASK.encode([TASK.question({"text": TEXT}, DATA, "here")], tokenizer)
    assert "label" not in example
    logits = torch.zeros(1, 12, 5)
    logits[0, :, 0] = 1
    logits[0, 3, 1] = logits[0, 5, 3] = 2
    assert TASK.told_of(logits, [example]) == [
        [
            {"start": 3, "end": 9, "label": "DRUG", "text": "Nubrex"},
            {"start": 10, "end": 14, "label": "DOSE", "text": "20mg"},
        ]
    ]
