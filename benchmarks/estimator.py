"""Is what is stored the teacher, in the mean?

    python benchmarks/estimator.py

100,000 draws at each of a few positions, from flat to sharp, made by the selection that captures run: the mean estimate
must lie within 4 standard errors of the truth at every entry (of thousands of entries a few lie beyond 4 by chance
alone: their expected number is printed beside the found one), and the estimates must add up to 1.
"""

import json
import math

import numpy as np
import torch

from workers.local.selection import SelectionSettings, select

DRAWS = 100_000


def mean_figures(kind: str, vocab_size: int, positions: int, draws: int, top_k: int) -> dict[str, object]:
    """Return how far the mean of many estimates lies from the truth."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(positions, vocab_size, generator=generator) * torch.linspace(0.5, 4, positions)[:, None]
    settings = SelectionSettings(kind=kind, top_k=top_k, draws=draws, vocab_size=vocab_size)  # type: ignore[arg-type]
    truth = torch.softmax(logits.double(), -1)
    worst, beyond, expected_beyond, sums = 0.0, 0, 0.0, 0.0
    for p in range(positions):
        row = torch.full((DRAWS,), p)
        uniform = torch.rand(DRAWS, 1, dtype=torch.float64, generator=generator)
        kept = select(logits, row, torch.zeros_like(row), uniform, settings)
        assert kept.draws is not None
        drawn = kept.draws[0] > 0
        rest = truth[p].clone()
        head = np.unique(kept.id[~drawn])
        rest[torch.from_numpy(head).long()] = 0
        mass = float(rest.sum())
        mean = np.bincount(kept.id[drawn], weights=kept.draws[0, drawn], minlength=vocab_size) * mass / draws / DRAWS
        fraction = (draws * rest.numpy() / mass) % 1
        error = mass / draws * np.sqrt(fraction * (1 - fraction) / DRAWS)
        score = np.abs(mean - rest.numpy()) / np.maximum(error, 1e-12)
        enough = draws * rest.numpy() / mass * DRAWS >= 25  # where the normal law holds
        worst = max(worst, float(score[enough].max()))
        beyond += int((score[enough] > 4).sum())
        expected_beyond += float(enough.sum()) * math.erfc(4 / math.sqrt(2))
        sums = max(sums, abs(float(mean.sum()) - mass))
    return {
        "benchmark": "estimator",
        "kind": kind,
        "vocab_size": vocab_size,
        "positions": positions,
        "repeats": DRAWS,
        "draws": draws,
        "largest_error_in_standard_errors": round(worst, 3),
        "entries_beyond_4": beyond,
        "expected_beyond_4": round(expected_beyond, 3),
        "sum_error": float(f"{sums:.2e}"),
    }


def main() -> None:
    """Print one JSON line for each kind."""
    for kind, draws, top_k in (("sampled", 50, 1), ("hybrid", 12, 12)):
        print(json.dumps(mean_figures(kind, 1000, 3, draws, top_k)), flush=True)


if __name__ == "__main__":
    main()
