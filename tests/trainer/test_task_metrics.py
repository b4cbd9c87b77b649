"""Scores of text: against worked examples, and intervals against theory."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.task_metrics import bleu, bleu_counts, exact_match, interval, mean, recall, token_f1

WORDS = st.lists(st.sampled_from(["the", "cat", "sat", "on", "mat", "dog"]), min_size=5, max_size=12).map(" ".join)


def bleu_of(*pairs: tuple[str, list[str]]) -> float:
    return float(bleu(np.sum([bleu_counts(text, references) for text, references in pairs], axis=0)[None])[0])


def test_exact_match_looks_past_case_articles_and_signs() -> None:
    assert exact_match("The  Eiffel tower!", ["eiffel tower", "x"]) == [1, 1]
    assert exact_match("Eiffel", ["eiffel tower"]) == [0, 1]


def test_f1_is_that_of_the_best_reference() -> None:
    # 2 shared words of 3 and 4: precision 2/3, recall 2/4.
    assert token_f1("red green blue", ["red green black white", "nothing"])[0] == pytest.approx(4 / 7)
    assert token_f1("", [""]) == [1, 1] and token_f1("", ["red"]) == [0, 1]
    assert token_f1("red red", ["red"])[0] == pytest.approx(2 / 3)


def test_bleu_agrees_with_a_worked_example() -> None:
    text, reference = "the cat sat on the mat today", "the cat sat on a mat today"
    # Matches: unigrams 6 of 7, bigrams 4 of 6, trigrams 2 of 5, 4-grams 1 of 4; equal lengths.
    expected = (6 / 7 * 4 / 6 * 2 / 5 * 1 / 4) ** 0.25
    assert bleu_of((text, [reference])) == pytest.approx(expected)
    short = "the cat sat on"
    assert bleu_of((short, [reference])) == pytest.approx(math.exp(1 - 7 / 4))
    assert bleu_of(("the the the the", ["the cat sat on"])) == 0  # clipped
    assert bleu_counts("the the the the", ["the cat", "the the"])[:2] == [2, 4]
    assert bleu_of(("", ["a b c d"])) == 0


@given(WORDS, WORDS)
def test_bleu_stays_between_nothing_and_the_reference_itself(text: str, other: str) -> None:
    assert bleu_of((text, [text, other])) == pytest.approx(1)
    assert 0 <= bleu_of((text, [other])) <= 1
    # More references never lose a match.
    assert np.all(np.array(bleu_counts(text, [other, text])[:8]) >= bleu_counts(text, [other])[:8])


def test_recall_counts_references_among_the_first() -> None:
    assert recall(["a", "b", "c"], ["b", "c"], 2) == [0.5, 1]
    assert recall(["a", "b", "c"], ["b", "c"], 3) == [1, 1]


def test_the_interval_of_a_mean_is_that_of_theory() -> None:
    hits = np.random.default_rng(0).random(400) < 0.7
    rows = np.stack([hits, np.ones(400)], axis=1).astype(float)
    score, low, high = interval(rows, mean)
    assert score == hits.mean()
    error = 1.96 * math.sqrt(score * (1 - score) / 400)
    assert (low, high) == (pytest.approx(score - error, abs=0.006), pytest.approx(score + error, abs=0.006))
    assert interval(rows, mean) == (score, low, high)
    assert interval(np.ones((5, 2)), mean) == (1, 1, 1)
