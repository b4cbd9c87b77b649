"""Principal components of hidden states: exact where they can be, the same every time, found out when damaged."""

from pathlib import Path

import numpy as np
import pytest

from storage.errors import InputError, IntegrityError
from storage.object_store import Store
from storage.projection import fit_projection, load_projection, save_projection


def states(rank: int, noise: float, seed: int = 0, positions: int = 800, width: int = 20) -> np.ndarray:
    """Return float32 [positions, width] that vary in `rank` directions, and by `noise` in all others."""
    rng = np.random.default_rng(seed)
    low = rng.normal(size=(positions, rank)) @ rng.normal(size=(rank, width)) + rng.normal(size=width)
    return (low + noise * rng.normal(size=(positions, width))).astype(np.float32)


def test_states_of_low_rank_come_back_exactly() -> None:
    values = states(rank=5, noise=0.0)
    found = fit_projection({"final": values}, 5)
    assert found.loss["final"] < 1e-6
    projected = found.project("final", values)
    assert projected.shape == (800, 5)
    np.testing.assert_allclose(found.restore("final", projected), values, atol=1e-4)


def test_the_loss_is_that_of_states_not_fitted_to_and_least_for_these_components() -> None:
    values, fresh = np.split(states(rank=3, noise=0.5, positions=3800), [800])
    found = fit_projection({"final": values}, 3)
    error = ((found.restore("final", found.project("final", fresh)) - fresh) ** 2).sum()
    share = error / ((fresh - fresh.mean(0)) ** 2).sum()
    assert found.loss["final"] == pytest.approx(float(share), rel=0.15)
    rows = found.components["final"]
    np.testing.assert_allclose(rows @ rows.T, np.eye(3), atol=1e-5)
    other = np.linalg.qr(np.random.default_rng(1).normal(size=(20, 3)))[0].T
    centred = fresh - found.mean["final"]
    assert ((centred - centred @ other.T @ other) ** 2).sum() > error


def test_the_same_states_give_the_same_file(tmp_path: Path) -> None:
    both = {"a": states(4, 0.1), "b": states(6, 0.2, seed=1)}
    store = Store(tmp_path)
    digests = {save_projection(store, fit_projection(both, 4)) for _ in range(3)}
    assert len(digests) == len(store.list()) == 1
    found = load_projection(store, digests.pop())
    np.testing.assert_array_equal(found.components["b"], fit_projection(both, 4).components["b"])


def test_damage_and_impossible_widths_are_refused(tmp_path: Path) -> None:
    store = Store(tmp_path)
    digest = save_projection(store, fit_projection({"final": states(4, 0.1)}, 4))
    [key] = store.list()
    raw = bytearray(store.read(key))
    raw[-3] ^= 1
    store.write(key, bytes(raw))
    with pytest.raises(IntegrityError, match="its digest is not its name"):
        load_projection(store, digest)
    with pytest.raises(InputError, match=r"hidden_projection 20: the layer final is 20 wide"):
        fit_projection({"final": states(4, 0.1)}, 20)
    with pytest.raises(InputError, match="8 of its states"):
        fit_projection({"final": states(4, 0.1, positions=10)}, 9)
