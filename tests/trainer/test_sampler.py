"""The planned order: mixture, epochs, purity, digests."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storage.errors import InputError
from trainer.sampler import (
    EMPTY_DIGEST,
    PlannedOrder,
    chain_digest,
    permutation,
    planned_counts,
    rank_slice,
)

POOLS = {
    "general": [bytes([1, n]) + bytes(14) for n in range(23)],
    "domain": [bytes([2, n]) + bytes(14) for n in range(7)],
}


def ramp(steps: int, start: float = 0.9, end: float = 0.1) -> np.ndarray:
    general = np.linspace(start, end, steps)
    return np.stack([general, 1 - general], axis=1)


@st.composite
def mixtures(draw: st.DrawFn, most_sources: int = 4) -> tuple[np.ndarray, int]:
    sources = draw(st.integers(1, most_sources))
    steps = draw(st.integers(1, 60))
    knots = [
        [draw(st.one_of(st.just(0.0), st.floats(0.01, 1.0))) for _ in range(sources)]
        for _ in range(draw(st.integers(1, 3)))
    ]
    rows = np.array([knots[min(len(knots) * t // steps, len(knots) - 1)] for t in range(steps)])
    rows[rows.sum(1) == 0] = 1.0
    return rows / rows.sum(1, keepdims=True), draw(st.integers(1, 40))


def test_every_pass_over_a_source_has_its_number() -> None:
    order = PlannedOrder(POOLS, ramp(20), 6, seed=3)
    seen: Counter[bytes] = Counter()
    for step in range(20):
        ids, epochs = order.step(step), order.step_epochs(step)
        assert epochs.shape == (6,)
        # A step's samples are shuffled, so that one seen twice in it may come in either order.
        for sample_id in {row.tobytes() for row in ids}:
            numbers = sorted(epochs[[row.tobytes() == sample_id for row in ids]].tolist())
            assert numbers == list(range(seen[sample_id], seen[sample_id] + len(numbers)))
            seen[sample_id] += len(numbers)
    assert max(seen.values()) > 3


@given(mixtures())
def test_every_step_is_full_and_sources_without_a_share_give_nothing(mixture: tuple[np.ndarray, int]) -> None:
    shares, size = mixture
    counts = planned_counts(shares, size)
    assert (counts >= 0).all()
    assert (counts.sum(axis=1) == size).all()
    never = shares.max(axis=0) == 0
    assert (counts[:, never] == 0).all()


@given(mixtures(most_sources=2))
def test_two_sources_stay_within_one_sample_in_any_window(mixture: tuple[np.ndarray, int]) -> None:
    shares, size = mixture
    error = np.cumsum(planned_counts(shares, size) - shares * size, axis=0)
    error = np.concatenate([np.zeros((1, shares.shape[1])), error])
    assert np.abs(error).max() <= 0.5 + 1e-6
    assert np.ptp(error, axis=0).max() <= 1 + 1e-6


@given(mixtures())
def test_any_number_of_sources_stays_close(mixture: tuple[np.ndarray, int]) -> None:
    shares, size = mixture
    error = np.cumsum(planned_counts(shares, size) - shares * size, axis=0)
    assert np.abs(error).max() < 1.5


def test_ramp_is_realised_within_one_point_over_100_steps() -> None:
    shares = ramp(1000)
    realised = planned_counts(shares, 16) / 16
    windows = np.lib.stride_tricks.sliding_window_view(realised - shares, 100, axis=0).mean(axis=-1)
    assert np.abs(windows).max() < 0.01


@given(st.integers(0, 300), st.integers())
def test_permutation_is_one_and_depends_on_its_key(size: int, seed: int) -> None:
    order = permutation(size, "epoch", seed)
    assert sorted(order.tolist()) == list(range(size))
    assert np.array_equal(order, permutation(size, "epoch", seed))


def test_permutation_never_changes_between_releases() -> None:
    assert permutation(8, "epoch", 0, "general", 0).tolist() == [5, 3, 6, 4, 0, 1, 7, 2]


@given(st.integers(0, 10_000), st.integers(1, 30), st.integers(2, 12))
@settings(max_examples=40)
def test_order_has_the_planned_sources_and_whole_epochs(seed: int, steps: int, size: int) -> None:
    order = PlannedOrder(POOLS, ramp(steps), size, seed)
    seen: dict[str, list[bytes]] = {name: [] for name in POOLS}
    for step in range(steps):
        ids = [row.tobytes() for row in order.step(step)]
        sources = order.step_sources(step)
        assert dict(Counter(sources)) == {n: c for n, c in zip(POOLS, order.counts[step], strict=True) if c}
        in_step: dict[str, list[bytes]] = {name: [] for name in POOLS}
        for sample, source in zip(ids, sources, strict=True):
            assert sample in POOLS[source]
            in_step[source].append(sample)
        for name in POOLS:
            seen[name] += in_step[name]
    for name, pool in POOLS.items():
        most, least = max(Counter(seen[name]).values(), default=0), min((seen[name].count(s) for s in pool), default=0)
        assert most - least <= 1 + (size >= len(pool))  # a step's shuffle may straddle two epochs


def test_order_does_not_depend_on_how_samples_are_stored_or_on_the_steps_asked_before() -> None:
    first = PlannedOrder(POOLS, ramp(20), 8, seed=3)
    second = PlannedOrder({name: pool[::-1] for name, pool in POOLS.items()}, ramp(20), 8, seed=3)
    steps = [second.step(t).tobytes() for t in reversed(range(20))][::-1]
    assert steps == [first.step(t).tobytes() for t in range(20)]
    assert first.digest() != PlannedOrder(POOLS, ramp(20), 8, seed=4).digest()


def test_rank_slices_share_a_step_out_and_the_digest_follows_it() -> None:
    order = PlannedOrder(POOLS, ramp(5), 12, seed=0)
    running = EMPTY_DIGEST
    for step in range(5):
        whole = order.step(step)
        for world_size in (1, 2, 3):
            parts = [whole[rank_slice(12, rank, world_size)] for rank in range(world_size)]
            assert np.array_equal(np.stack(parts, axis=1).reshape(-1, 16), whole)
        running = chain_digest(running, whole)
        assert order.digest(step + 1) == running
    assert order.digest() == running


def test_used_ids_are_those_of_all_steps() -> None:
    order = PlannedOrder(POOLS, ramp(2), 4, seed=0)
    used = {row.tobytes() for step in range(2) for row in order.step(step)}
    assert {row.tobytes() for row in order.used_ids()} == used


def test_too_many_passes_are_refused_with_their_number() -> None:
    order = PlannedOrder(POOLS, ramp(20), 8, seed=0)
    assert order.epochs()["domain"] == pytest.approx(80 / 7)
    with pytest.raises(InputError, match=r"passes 11.43 times over 'domain' \(7 training samples\)"):
        order.check_epochs(4)
    order.check_epochs(12)
