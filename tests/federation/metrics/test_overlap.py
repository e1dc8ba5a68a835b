from __future__ import annotations

import pytest

from fedgrove.federation.metrics.overlap import Overlap, words


def test_rouge_is_the_librarys_on_plain_english() -> None:
    from rouge_score.rouge_scorer import RougeScorer

    library = RougeScorer(["rouge1", "rougeL"], use_stemmer=True)
    cases = [
        ("The cats were sitting on the mat.", "A cat sits on the mat"),
        ("42 is the answer", "The answer: 42!"),
        ("under_scores and hy-phens, it's", "under scores and hyphens its"),
        ("", "nothing"),
    ]
    for output, reference in cases:
        expected = library.score(reference, output)
        found = Overlap()(output, [reference])
        assert found["rouge_1"] == pytest.approx(expected["rouge1"].fmeasure)
        assert found["rouge_l"] == pytest.approx(expected["rougeL"].fmeasure)


def test_the_best_reference_counts_and_other_scripts_have_words() -> None:
    assert Overlap()("a cat", ["dogs", "a cat"]) == {
        "rouge_1": 1.0,
        "rouge_l": 1.0,
        "exact_match": 1.0,
    }
    assert words("Über 你好 naïve!") == ["über", "你", "好", "naïve"]
    assert Overlap()("你好", ["你们好"])["rouge_l"] == pytest.approx(0.8)


@pytest.mark.parametrize(
    ("output", "reference", "same"),
    [
        ("Yes.", "yes", 1),
        ("the  Cat", "The cat!", 1),
        ("a cat", "cat", 0),
        ("?!", "?!", 1),
        ("!", "?!", 0),
    ],
)
def test_exact_match_passes_over_case_punctuation_and_space(
    output: str, reference: str, same: float
) -> None:
    assert Overlap()(output, [reference])["exact_match"] == same
