"""What a generated text shares with its references: ROUGE (the library rouge-score) and exact
match.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

#: letters and digits of any script; a character of a script without spaces is a word of its own
_WORD = re.compile(r"[぀-ヿ㐀-䶿一-鿿豈-﫿]|[^\W_぀-ヿ㐀-䶿一-鿿豈-﫿]+")


class Overlap:
    """``overlap(output, references)``: ROUGE-1 and ROUGE-L (F1, stemmed, best reference of each)
    and exact match.
    """

    def __init__(self) -> None:
        from rouge_score.rouge_scorer import RougeScorer

        self._scorer = RougeScorer(["rouge1", "rougeL"], tokenizer=_Words())

    def __call__(self, output: str, references: Sequence[str]) -> dict[str, float]:
        best = self._scorer.score_multi(list(references), output)
        return {
            "rouge_1": best["rouge1"].fmeasure,
            "rouge_l": best["rougeL"].fmeasure,
            "exact_match": float(any(_same(output, reference) for reference in references)),
        }


class _Words:
    """The library's own tokenizer with its stemmer, which knows a to z and digits alone, for every
    script.
    """

    def __init__(self) -> None:
        from nltk.stem.porter import PorterStemmer

        self._stem: Any = PorterStemmer().stem

    def tokenize(self, text: str) -> list[str]:
        return [self._stem(word) if len(word) > 3 else word for word in words(text)]


def words(text: str) -> list[str]:
    """In lower case, without punctuation and white space."""
    return _WORD.findall(text.lower())


def _same(output: str, reference: str) -> bool:
    """Case, punctuation and white space aside; of a reference that is nothing else, to the
    letter.
    """
    expected = words(reference)
    return words(output) == expected if expected else output.strip() == reference.strip()
