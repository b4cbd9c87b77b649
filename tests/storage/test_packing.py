"""Windows: nothing lost, nothing doubled, nothing crosses a document's border."""

from collections import Counter
from itertools import pairwise

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from storage.packing import EncodedDocument, Packer, cut, pack_documents, trim
from storage.samples import Sample


def document(start: int, supervised: list[bool]) -> EncodedDocument:
    """A document whose token ids name their own place, so that every one can be followed."""
    return EncodedDocument(
        np.arange(start, start + len(supervised), dtype=np.int32), np.array(supervised, dtype=np.bool_)
    )


@st.composite
def corpora(draw: st.DrawFn, fully: bool = False) -> list[EncodedDocument]:
    """Documents of 0 to 40 tokens with distinct token ids."""
    masks = st.lists(st.just(True) if fully else st.booleans(), max_size=40)
    drawn = draw(st.lists(masks, max_size=8))
    return [document(1000 * n, mask) for n, mask in enumerate(drawn)]


WINDOWS = st.integers(2, 16)


def pieces(windows: list[Sample]) -> list[tuple[np.ndarray, np.ndarray]]:
    """The tokens and mask of each document's part in each window."""
    found = []
    for window in windows:
        borders = np.flatnonzero(np.diff(window.document)) + 1
        found += zip(np.split(window.tokens, borders), np.split(window.supervised, borders), strict=True)
    return found


@given(documents=corpora(), window_tokens=WINDOWS, pack=st.booleans())
def test_every_supervised_token_is_supervised_exactly_once(
    documents: list[EncodedDocument], window_tokens: int, pack: bool
) -> None:
    windows = list(pack_documents(documents, "s", window_tokens, pack))
    found = Counter(int(t) for window in windows for t in window.tokens[window.supervised])
    expected = Counter(int(t) for d in documents for t in d.tokens[1:][d.supervised[1:]])
    assert found == expected


@given(documents=corpora(fully=True), window_tokens=WINDOWS, pack=st.booleans())
def test_plain_documents_lose_nothing_but_their_first_tokens(
    documents: list[EncodedDocument], window_tokens: int, pack: bool
) -> None:
    windows = list(pack_documents(documents, "s", window_tokens, pack))
    supervised = np.concatenate([window.tokens[window.supervised] for window in windows] or [np.zeros(0)])
    assert sorted(supervised) == sorted(t for d in documents for t in d.tokens[1:])


@given(documents=corpora(), window_tokens=WINDOWS, pack=st.booleans())
def test_windows_keep_the_contract(documents: list[EncodedDocument], window_tokens: int, pack: bool) -> None:
    windows = list(pack_documents(documents, "s", window_tokens, pack))
    for window in windows:
        assert 2 <= len(window.tokens) <= window_tokens
        assert window.tokens.dtype == np.int32
        assert window.supervised.dtype == np.bool_ and window.supervised.any()
        assert window.document.dtype == np.int16 and window.document[0] == 0
        assert set(np.diff(window.document)) <= {0, 1}
        assert pack or window.document.max() == 0
    for tokens, supervised in pieces(windows):
        assert len(tokens) >= 2
        assert not supervised[0], "a document's first token has no context"
        assert supervised[1:].any()
        np.testing.assert_array_equal(np.diff(tokens), 1)


@given(documents=corpora(fully=True), window_tokens=WINDOWS)
def test_successive_pieces_overlap_by_one_token(documents: list[EncodedDocument], window_tokens: int) -> None:
    owners: dict[int, list[np.ndarray]] = {}
    for tokens, _ in pieces(list(pack_documents(documents, "s", window_tokens))):
        owners.setdefault(int(tokens[0]) // 1000, []).append(tokens)
    for parts in owners.values():
        assert all(right[0] == left[-1] for left, right in pairwise(parts))


@given(documents=corpora(fully=True), window_tokens=WINDOWS)
def test_a_document_that_fits_is_never_cut(documents: list[EncodedDocument], window_tokens: int) -> None:
    whole = {int(d.tokens[0]): len(d) for d in documents if 2 <= len(d) <= window_tokens}
    found = [(int(tokens[0]), len(tokens)) for tokens, _ in pieces(list(pack_documents(documents, "s", window_tokens)))]
    starts = dict(found)
    assert all(starts[start] == length for start, length in whole.items())


@given(documents=corpora(), window_tokens=WINDOWS, split=st.integers(0, 8))
def test_windows_depend_on_the_order_of_documents_alone(
    documents: list[EncodedDocument], window_tokens: int, split: int
) -> None:
    packer = Packer("s", window_tokens)
    pushed = [w for d in documents for w in packer.add(d)] + packer.flush()
    ids = [window.sample_id for window in pack_documents(iter(documents), "s", window_tokens)]
    assert [window.sample_id for window in pushed] == ids
    prefix = [window.sample_id for window in pack_documents(documents[:split], "s", window_tokens)]
    assert prefix[:-1] == ids[: max(0, len(prefix) - 1)], "later documents must not change earlier windows"


@given(documents=corpora(fully=True), window_tokens=st.integers(8, 16))
def test_windows_are_filled_in_order(documents: list[EncodedDocument], window_tokens: int) -> None:
    windows = list(pack_documents(documents, "s", window_tokens))
    for left, right in pairwise(windows):
        first = int(np.sum(right.document == 0))
        assert len(left.tokens) + first > window_tokens, "the next piece would have fitted"


def test_an_example_by_hand() -> None:
    documents = [document(0, [True] * 3), document(100, [True] * 4), document(200, [True] * 12), document(300, [True])]
    first, second, third = pack_documents(documents, "s", 8)
    assert first.tokens.tolist() == [0, 1, 2, 100, 101, 102, 103]
    assert first.document.tolist() == [0, 0, 0, 1, 1, 1, 1]
    assert first.supervised.tolist() == [False, True, True, False, True, True, True]
    assert second.tokens.tolist() == list(range(200, 208))
    assert third.tokens.tolist() == list(range(207, 212))
    assert third.supervised.tolist() == [False, True, True, True, True]
    assert first.source == "s"


def test_a_long_document_fills_the_room_that_is_left() -> None:
    first, second = pack_documents([document(0, [True] * 4), document(100, [True] * 11)], "s", 8)
    assert first.tokens.tolist() == [0, 1, 2, 3, 100, 101, 102, 103]
    assert second.tokens.tolist() == list(range(103, 111))


def test_a_long_document_does_not_start_in_too_little_room() -> None:
    first, second, third = pack_documents([document(0, [True] * 7), document(100, [True] * 9)], "s", 8)
    assert first.tokens.tolist() == list(range(7))
    assert second.tokens.tolist() == list(range(100, 108))
    assert third.tokens.tolist() == [107, 108]
    short, *_ = pack_documents([document(0, [True] * 13), document(100, [True] * 20)], "s", 16)
    assert short.tokens.tolist() == list(range(13)), "three tokens of context are not worth a cut"


def test_what_no_prediction_sees_is_left_out() -> None:
    assert len(trim(document(0, [True, False, True, False, False]))) == 3
    assert len(trim(document(0, [True, False]))) == 0
    assert len(trim(document(0, []))) == 0
    prompt_only_first = list(cut(trim(document(0, [False] * 9 + [True])), 4, 4))
    assert [piece.tokens.tolist() for piece in prompt_only_first] == [[6, 7, 8, 9]]


def test_documents_of_a_window_stay_countable() -> None:
    documents = [document(10 * n, [True, True]) for n in range(32_768)]
    first, second = pack_documents(documents, "s", 1 << 17)
    assert first.document.max() == 32_766 and first.document.min() == 0
    assert len(second.tokens) == 2
