"""Differences of two captures: entries matched by position and token, spreads as numpy gives them."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from storage.compare import Spread, compare
from storage.errors import InputError
from storage.identity import DatasetIdentity
from storage.samples import SampleBatch
from storage.targets import TargetBatch

MakeIdentity = Callable[..., DatasetIdentity]
MakeUnit = Callable[..., tuple[SampleBatch, TargetBatch]]


@pytest.mark.parametrize("kind", ["topk", "hybrid"])
def test_entries_are_matched_by_token_whatever_their_order(
    kind: str, make_identity: MakeIdentity, make_unit: MakeUnit
) -> None:
    targets = make_unit(make_identity(kind))[1]
    same = compare(targets, targets, kind)
    assert (same.of, same.compared, same.unmatched, same.top1_agreement) == ("logprob", len(targets.id), 0.0, 1.0)
    assert same.spread == Spread(0.0, 0.0, 0.0, 0.0, 0.0)
    # Entries of each position in another order, all off by a quarter but for one token that was replaced.
    order = np.concatenate([np.arange(a, b)[::-1] for a, b in zip(*_edges(targets), strict=True)])
    shifted = replace(targets, id=targets.id[order].copy(), logprob=targets.logprob[order] - np.float16(0.25))
    shifted.id[0] = 499 - shifted.id[0] if 499 - shifted.id[0] not in shifted.id[: targets.count[0]] else 250
    found = compare(targets, shifted, kind)
    assert found.compared == len(targets.id) - 1
    assert found.unmatched == pytest.approx(1 / len(targets.id))
    assert found.spread.p50 == pytest.approx(0.25, abs=0.01) and found.spread.max < 0.27
    assert found.top1_agreement is not None and found.top1_agreement < 0.2


def test_kinds_without_logprobs_are_compared_by_loss(make_identity: MakeIdentity, make_unit: MakeUnit) -> None:
    targets = make_unit(make_identity("text"))[1]
    found = compare(targets, replace(targets, teacher_nll=targets.teacher_nll + 0.5), "text")
    assert (found.of, found.compared, found.top1_agreement) == ("nll", len(targets), None)
    assert found.spread.p99 == pytest.approx(0.5, abs=1e-6)


def test_captures_of_other_samples_are_refused(make_identity: MakeIdentity, make_unit: MakeUnit) -> None:
    identity = make_identity()
    with pytest.raises(InputError, match="not of the same samples"):
        compare(make_unit(identity, seed=1)[1], make_unit(identity, seed=2)[1], "hybrid")


def _edges(targets: TargetBatch) -> tuple[list[int], list[int]]:
    offsets = targets.entry_offsets.tolist()
    return offsets[:-1], offsets[1:]
