"""Scores of generated text against references, and their confidence intervals; imports no torch.

Every metric gives each example a row of numbers, and the score is a function of the rows' sum, so that resampling the
examples (Efron's percentile bootstrap) gives an interval for any of them.
"""

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

Float64Array = NDArray[np.float64]
Score = Callable[[Float64Array], Float64Array]
"""Turns sums of rows [R, columns] into scores [R]."""

NGRAMS = 4
RESAMPLES = 1000
LEVEL = 0.95

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_WORDS = re.compile(r"\w+|[^\w\s]")


def normalised(text: str) -> str:
    """Return lower-case text without punctuation, articles and repeated spaces, as SQuAD's scorer does."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(text: str, references: Sequence[str]) -> list[float]:
    """Return [whether the text is one of the references, normalised; 1]."""
    return [float(normalised(text) in {normalised(reference) for reference in references}), 1.0]


def token_f1(text: str, references: Sequence[str]) -> list[float]:
    """Return [F1 of the words shared with the best reference, normalised; 1] (Rajpurkar et al. 2016)."""
    found = normalised(text).split()
    return [max(_f1(found, normalised(reference).split()) for reference in references), 1.0]


def bleu_counts(text: str, references: Sequence[str]) -> list[float]:
    """Return clipped n-gram matches and n-grams for n = 1 … 4, then the words of the text and of the closest reference.

    Words are runs of letters and digits, or single signs (Papineni et al. 2002; ties go to the shorter reference).
    """
    words, others = _WORDS.findall(text), [_WORDS.findall(reference) for reference in references]
    row: list[float] = []
    for n in range(1, NGRAMS + 1):
        own = _ngrams(words, n)
        most: Counter[tuple[str, ...]] = Counter()
        for other in others:
            most |= _ngrams(other, n)
        row += [float((own & most).total()), float(own.total())]
    closest = min((len(other) for other in others), key=lambda length: (abs(length - len(words)), length))
    return [*row, float(len(words)), float(closest)]


def recall(ranked: Sequence[str], references: Sequence[str], k: int) -> list[float]:
    """Return [share of the references among the first k candidates; 1]."""
    return [len(set(references) & set(ranked[:k])) / len(set(references)), 1.0]


def mean(sums: Float64Array) -> Float64Array:
    """Return the mean of the first column."""
    return np.asarray(sums[:, 0] / sums[:, 1])


def bleu(sums: Float64Array) -> Float64Array:
    """Return corpus BLEU from 0 to 1: brevity penalty · geometric mean of the precisions; 0 where one of them is 0."""
    matches, total = sums[:, 0 : 2 * NGRAMS : 2], sums[:, 1 : 2 * NGRAMS : 2]
    with np.errstate(divide="ignore", invalid="ignore"):
        precision = np.exp(np.log(matches / total).mean(axis=1))
        penalty = np.exp(np.minimum(0.0, 1.0 - sums[:, -1] / sums[:, -2]))
    return np.asarray(np.nan_to_num(precision * penalty))


def interval(rows: Float64Array, score: Score, seed: int = 0) -> tuple[float, float, float]:
    """Return the score of examples [N, columns], and the ends of its 95% percentile bootstrap interval."""
    times = np.random.default_rng(seed).multinomial(len(rows), np.full(len(rows), 1 / len(rows)), RESAMPLES)
    low, high = np.quantile(score(times @ rows), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(score(rows.sum(axis=0)[None])[0]), float(low), float(high)


def _f1(found: list[str], reference: list[str]) -> float:
    if not found or not reference:
        return float(found == reference)
    shared = (Counter(found) & Counter(reference)).total()
    return 2 * shared / (len(found) + len(reference))


def _ngrams(words: list[str], n: int) -> "Counter[tuple[str, ...]]":
    return Counter(tuple(words[at : at + n]) for at in range(len(words) - n + 1))
