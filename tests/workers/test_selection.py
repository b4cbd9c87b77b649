"""Selection on the device against a dense float64 reference."""

import numpy as np
import pytest
import torch

from workers.local.selection import NonFiniteLogitsError, Selection, SelectionSettings, select, uniforms

POSITIONS = 40


def peaked_logits(positions: int, width: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    sharpness = torch.rand(positions, 1, generator=generator) * 6 + 0.5
    return torch.randn(positions, width, generator=generator) * sharpness


def run(
    logits: torch.Tensor, kind: str, vocab_size: int, top_k: int = 8, draws: int = 6, seed: int = 0, draw_sets: int = 1
) -> Selection:
    truth = torch.arange(len(logits)) % vocab_size
    uniform = torch.from_numpy(np.random.default_rng(seed).random((draw_sets, len(logits))).T.copy())
    settings = SelectionSettings(kind=kind, top_k=top_k, draws=draws, vocab_size=vocab_size)  # type: ignore[arg-type]
    return select(logits, torch.arange(len(logits)), truth, uniform, settings)


def split(selection: Selection, values: np.ndarray) -> list[np.ndarray]:
    return np.split(values, np.cumsum(selection.count)[:-1])


@pytest.mark.parametrize("width,vocab_size", [(1000, 1000), (1152, 1001), (130, 100)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_topk_is_the_dense_top(width: int, vocab_size: int, dtype: torch.dtype) -> None:
    logits = peaked_logits(POSITIONS, width).to(dtype)
    got = run(logits, "topk", vocab_size)
    reference = torch.log_softmax(logits.double()[:, :vocab_size], -1)
    best = reference.topk(8)
    for p, (ids, logprob) in enumerate(zip(split(got, got.id), split(got, got.logprob), strict=True)):
        expected = reference[p, ids].numpy()
        np.testing.assert_allclose(logprob.astype(np.float64), expected, rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(np.sort(expected), np.sort(best.values[p].numpy()), rtol=1e-6)
        assert (np.diff(expected) <= 1e-6).all()
    tail = 1 - best.values.exp().sum(-1).numpy()
    np.testing.assert_allclose(got.tail_mass.astype(np.float64), tail, rtol=2e-3, atol=1e-6)


def test_statistics_match_the_dense_reference() -> None:
    logits = peaked_logits(POSITIONS, 700)
    got = run(logits, "topk", 650)
    reference = torch.log_softmax(logits.double()[:, :650], -1)
    truth = torch.arange(POSITIONS) % 650
    np.testing.assert_allclose(got.nll, -reference[torch.arange(POSITIONS), truth].numpy(), rtol=1e-5)
    np.testing.assert_allclose(got.entropy, -(reference.exp() * reference).sum(-1).numpy(), rtol=1e-4, atol=5e-5)


def test_hybrid_head_draws_and_tail() -> None:
    logits = peaked_logits(POSITIONS, 2000)
    got = run(logits, "hybrid", 2000)
    reference = torch.log_softmax(logits.double(), -1)
    assert got.draws is not None
    parts = zip(split(got, got.id), split(got, got.logprob), split(got, got.draws[0]), strict=True)
    for p, (ids, logprob, draws) in enumerate(parts):
        head, drawn = ids[draws == 0], ids[draws > 0]
        assert set(head) == set(reference[p].topk(8).indices.tolist())
        assert draws.sum() == 6
        assert (np.diff(drawn) > 0).all()
        assert not set(head) & set(drawn)
        np.testing.assert_allclose(logprob.astype(np.float64), reference[p, ids].numpy(), rtol=1e-3, atol=1e-4)
        outside = 1 - reference[p, ids].exp().sum().item()
        assert got.tail_mass[p] == pytest.approx(outside, rel=3e-3, abs=1e-6)


@pytest.mark.parametrize("draw_sets", [1, 3])
def test_counts_are_those_of_hybrid_with_the_estimate_in_place_of_log_probabilities(draw_sets: int) -> None:
    logits = peaked_logits(POSITIONS, 700)
    known = run(logits, "hybrid", 700, draw_sets=draw_sets)
    got = run(logits, "hybrid_counts", 700, draw_sets=draw_sets)
    np.testing.assert_array_equal(got.id, known.id)
    np.testing.assert_array_equal(got.draws, known.draws)
    assert not got.tail_mass.any() and got.draws is not None
    drawn = got.draws.any(0)
    np.testing.assert_array_equal(got.logprob[~drawn], known.logprob[~drawn])
    row = np.repeat(np.arange(POSITIONS), got.count)
    shared = np.bincount(row, weights=drawn * np.exp(known.logprob.astype(np.float64)), minlength=POSITIONS)
    expected = (shared + known.tail_mass)[row] * got.draws.sum(0) / (6 * draw_sets)
    np.testing.assert_allclose(np.exp(got.logprob[drawn].astype(np.float64)), expected[drawn], rtol=2e-2)


def test_hybrid_estimate_is_unbiased() -> None:
    """The mean estimate over many draws lies within 4 standard errors of the truth at every entry."""
    trials, vocab_size, draws = 20_000, 300, 5
    logits = peaked_logits(1, vocab_size, seed=3) * 0.5
    probability = torch.softmax(logits.double(), -1)[0].numpy()
    got = run(logits.expand(trials, -1).contiguous(), "hybrid", vocab_size, top_k=4, draws=draws)
    assert got.draws is not None
    head = np.argsort(-probability)[:4]
    rest = 1 - probability[head].sum()
    is_drawn = got.draws[0] > 0
    share = np.zeros(vocab_size)
    np.add.at(share, got.id[is_drawn], rest * got.draws[0, is_drawn] / draws)
    mean = share / trials
    expected = probability.copy()
    expected[head] = 0
    fraction = (draws * expected / rest) % 1
    error = rest / draws * np.sqrt(fraction * (1 - fraction) / trials)
    assert (np.abs(mean - expected) <= 4 * error + 1e-7).all()
    assert mean.sum() == pytest.approx(rest, abs=1e-9)


def test_sampled_estimate_is_unbiased_in_every_set() -> None:
    trials, vocab_size, draws = 20_000, 300, 12
    logits = peaked_logits(1, vocab_size, seed=3) * 0.5
    probability = torch.softmax(logits.double(), -1)[0].numpy()
    got = run(logits.expand(trials, -1).contiguous(), "sampled", vocab_size, draws=draws, draw_sets=2)
    assert got.draws is not None
    fraction = (draws * probability) % 1
    error = np.sqrt(fraction * (1 - fraction) / trials) / draws
    means = []
    for drawn in got.draws:
        mean = np.bincount(got.id, weights=drawn, minlength=vocab_size) / draws / trials
        assert (np.abs(mean - probability) <= 4 * error + 1e-7).all()
        assert mean.sum() == pytest.approx(1, abs=1e-9)
        means.append(mean)
    assert np.abs(means[0] - means[1]).max() > 0


@pytest.mark.parametrize("kind", ["sampled", "hybrid", "hybrid_counts"])
def test_sets_of_draws_lie_side_by_side(kind: str) -> None:
    logits = peaked_logits(POSITIONS, 700)
    got = run(logits, kind, 700, draw_sets=3)
    assert got.draws is not None and got.draws.shape == (3, len(got.id))
    head = 0 if kind == "sampled" else 8
    for ids, *sets in zip(split(got, got.id), *(split(got, drawn) for drawn in got.draws), strict=True):
        assert [int(drawn.sum()) for drawn in sets] == [6, 6, 6]
        never = np.sum(sets, axis=0) == 0
        assert never[:head].all() and not never[head:].any()
        assert (np.diff(ids[head:]) > 0).all()
    alone = run(logits, kind, 700)
    assert alone.draws is not None
    first = got.draws[0] > 0
    assert (got.id[first] == alone.id[alone.draws[0] > 0]).all()
    assert (got.draws[0, first] == alone.draws[alone.draws > 0]).all()


def test_text_keeps_no_entries_but_the_statistics() -> None:
    logits = peaked_logits(POSITIONS, 700)
    got, known = run(logits, "text", 700), run(logits, "topk", 700)
    assert len(got.id) == 0 and got.draws is None and not got.count.any()
    assert (got.tail_mass == 1).all()
    np.testing.assert_array_equal(got.nll, known.nll)
    np.testing.assert_array_equal(got.entropy, known.entropy)


def test_draws_are_reproducible_and_differ_between_samples() -> None:
    first, again = uniforms(7, b"a" * 16, 50), uniforms(7, b"a" * 16, 50)
    assert (first == again).all()
    assert (uniforms(7, b"a" * 16, 20) == first[:20]).all()
    assert (uniforms(7, b"a" * 16, 50, draw_sets=3)[:, :1] == first).all()
    assert (uniforms(7, b"b" * 16, 50) != first).all()
    assert (uniforms(8, b"a" * 16, 50) != first).all()
    assert ((first >= 0) & (first < 1)).all()


def test_one_sided_distribution_has_nothing_to_draw() -> None:
    logits = torch.full((3, 500), -1e4)
    logits[:, :8] = torch.arange(8.0)
    got = run(logits, "hybrid", 500)
    assert got.draws is not None
    assert got.count.tolist() == [8, 8, 8]
    assert got.tail_mass.tolist() == [0, 0, 0]
    assert np.isfinite(got.entropy).all()


def test_masked_entries_have_no_probability() -> None:
    logits = peaked_logits(4, 600)
    logits[:, 100:] = -torch.inf
    got = run(logits, "hybrid", 600)
    assert (got.id < 100).all()
    assert np.isfinite(got.entropy).all()


def test_dense_keeps_everything() -> None:
    logits = peaked_logits(5, 256)
    got = run(logits, "dense", 200)
    assert got.count.tolist() == [200] * 5
    expected = torch.log_softmax(logits[:, :200], -1).flatten().numpy()
    np.testing.assert_allclose(got.logprob.astype(np.float32), expected, rtol=1e-3, atol=1e-4)
    assert (got.id.reshape(5, 200) == np.arange(200)).all()


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_non_finite_logits_are_refused_with_their_positions(poison: float) -> None:
    logits = peaked_logits(POSITIONS, 151_936)
    logits[17, 150_000] = poison
    with pytest.raises(NonFiniteLogitsError) as caught:
        run(logits, "hybrid", 151_936)
    assert caught.value.positions == [17]
