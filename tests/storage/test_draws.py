"""Reading draws: estimates add up to one, sets are told apart, nothing of the teacher's mass is lost."""

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storage.contract import check_contract
from storage.draws import draw_set, drawn_logprob, estimate
from storage.identity import DRAWN_KINDS, DatasetIdentity
from storage.samples import SampleBatch
from storage.targets import TargetBatch

MakeIdentity = Callable[..., DatasetIdentity]
MakeUnit = Callable[..., tuple[SampleBatch, TargetBatch]]


@settings(max_examples=25)
@given(kind=st.sampled_from(sorted(DRAWN_KINDS)), sets=st.integers(1, 4), seed=st.integers(0, 2**32 - 1))
def test_one_set_keeps_the_contract_of_a_dataset_of_one_set(
    make_identity: MakeIdentity, make_unit: MakeUnit, kind: str, sets: int, seed: int
) -> None:
    samples, targets = make_unit(make_identity(kind, draw_sets=sets), seed=seed)
    chosen = np.random.default_rng(seed).integers(0, sets, len(samples))
    one = draw_set(targets, kind, chosen)
    check_contract(samples, one, make_identity(kind))
    rows = one.offsets[:-1][samples.num_supervised() > 0]
    for n, first in zip(np.flatnonzero(samples.num_supervised() > 0), rows, strict=True):
        kept = slice(*one.entry_offsets[first : first + 2])
        before = slice(*targets.entry_offsets[first : first + 2])
        wanted = dict(zip(targets.id[before].tolist(), targets.draws[chosen[n], before].tolist(), strict=True))
        assert one.draws[0, kept].tolist() == [wanted[i] for i in one.id[kept].tolist()]


@pytest.mark.parametrize("kind", ["hybrid", "hybrid_counts", "sampled"])
@pytest.mark.parametrize("sets", [1, 3])
def test_estimates_add_up_to_one(make_identity: MakeIdentity, make_unit: MakeUnit, kind: str, sets: int) -> None:
    _, targets = make_unit(make_identity(kind, draw_sets=sets))
    sums = np.add.reduceat(estimate(targets, kind), targets.entry_offsets[:-1])
    # The mass of a head that was never drawn from stays in the tail.
    undrawn = targets.draws.sum(0)
    spare = np.where(np.add.reduceat(undrawn, targets.entry_offsets[:-1]) == 0, targets.tail_mass, 0)
    np.testing.assert_allclose(sums + spare, 1, atol=5e-3)


def test_all_sets_together_are_their_mean(make_identity: MakeIdentity, make_unit: MakeUnit) -> None:
    _, targets = make_unit(make_identity("sampled", draw_sets=3))
    pooled = estimate(targets, "sampled")
    np.testing.assert_allclose(pooled, targets.draws.sum(0) / 15, rtol=1e-6)
    logprob = drawn_logprob(targets.draws, targets.count).astype(np.float32)
    np.testing.assert_allclose(np.exp(logprob), pooled, rtol=2e-3)
