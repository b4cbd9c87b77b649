"""The stored output head: kept once, found damaged or foreign, and how states and head become distributions."""

from pathlib import Path

import pytest
import torch

from storage.errors import InputError, IntegrityError
from storage.heads import Head, check_heads, full_logprobs, load_head, save_head
from storage.object_store import Store

FINGERPRINT = "ab" * 16


def make_head(seed: int = 0, bias: bool = True, **fields: float) -> Head:
    made = torch.Generator().manual_seed(seed)
    weight = torch.randn(40, 12, generator=made)
    return Head(weight, torch.randn(40, generator=made) if bias else None, 37, **fields)


def test_a_head_is_stored_once_and_comes_back_equal(tmp_path: Path) -> None:
    store, head = Store(tmp_path), make_head(scale=0.5, softcap=30.0)
    keys = {save_head(store, head, FINGERPRINT) for _ in range(3)}
    assert store.list() == sorted(keys) and len(keys) == 1
    found = load_head(store, FINGERPRINT)
    assert torch.equal(found.weight, head.weight) and found.bias is not None and torch.equal(found.bias, head.bias)
    assert (found.vocab_size, found.scale, found.softcap) == (37, 0.5, 30.0)
    assert check_heads(store, FINGERPRINT, needed=True) == []


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_chunks_join_to_the_softmax_of_the_unpadded_logits(temperature: float) -> None:
    head = make_head(scale=2.0, softcap=5.0)
    states = torch.randn(29, 12, generator=torch.Generator().manual_seed(1))
    logits = (states.double() @ head.weight[:37].double().T + head.bias[:37].double()) * 2.0  # type: ignore[index]
    expected = torch.log_softmax(torch.tanh(logits / 5.0) * 5.0 / temperature, -1)
    chunks = list(full_logprobs(states, head, temperature, chunk_bytes=4 * 37 * 8))
    assert [len(chunk) for chunk in chunks] == [8, 8, 8, 5]
    torch.testing.assert_close(torch.cat(chunks).double(), expected, atol=1e-5, rtol=0)


def test_states_that_do_not_fit_and_odd_temperatures_are_refused() -> None:
    with pytest.raises(InputError, match=r"\[3, 5\] do not fit a head of width 12"):
        list(full_logprobs(torch.zeros(3, 5), make_head()))
    with pytest.raises(InputError, match="temperature 0 is not positive"):
        list(full_logprobs(torch.zeros(3, 12), make_head(), temperature=0))


def test_a_changed_missing_or_foreign_head_is_found(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with pytest.raises(InputError, match="keeps no output head"):
        load_head(store, FINGERPRINT)
    assert "output head is missing" in check_heads(store, FINGERPRINT, needed=True)[0]
    key = save_head(store, make_head(), FINGERPRINT)
    with pytest.raises(IntegrityError, match="belongs to a dataset with fingerprint abab"):
        load_head(store, "cd" * 16)
    raw = bytearray(store.read(key))
    for at in range(0, len(raw), 97):
        raw[at] ^= 4
        store.write(key, bytes(raw))
        assert "its digest is not its name" in check_heads(store, FINGERPRINT, needed=True)[0]
        raw[at] ^= 4
