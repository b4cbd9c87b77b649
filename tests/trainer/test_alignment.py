"""Two tokenizers over one text: every chunk spells the same bytes on both sides, and is the smallest that does."""

import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storage.samples import Sample
from storage.token_bytes import token_bytes
from storage.tokenizer import Tokenizer
from tests.storage.tiny_tokenizers import write_sentence_piece, write_tokenizer
from trainer import alignment
from trainer.alignment import Aligned, Aligner, overlay

CORPUS = ["the red fox and the lazy dog, naïve 漢字 漢字 fox", "un zorro rojo y el perro"] * 9
WORDS = st.sampled_from(
    ["the ", "red ", "fox", " lazy", "\n", "漢字", "漢", "naïve", "é", "🙂", "zorro ", "<|end|>", "x"]
)
TEXT = st.lists(WORDS, min_size=1, max_size=12).map("".join)
SIDES = ["fine", "coarse", "begin", "piece", "bare"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tokenizers")
    begins = {"bos_token": "<|begin|>", "add_bos_token": True}
    return {
        "fine": write_tokenizer(root / "fine"),
        "coarse": write_tokenizer(root / "coarse", CORPUS),
        "begin": write_tokenizer(root / "begin", CORPUS[1:2] * 5, merges=60, **begins),
        "piece": write_sentence_piece(root / "piece", CORPUS),
        "bare": write_tokenizer(root / "bare", CORPUS, merges=90, eos_token=None),
    }


def aligner(folders: dict[str, Path], teacher: str, student: str, *most: int) -> Aligner:
    return Aligner(Tokenizer.load(folders[teacher]), Tokenizer.load(folders[student]), *most)


def sample_of(tokenizer: Tokenizer, texts: list[str], chance: np.random.Generator, part: bool) -> Sample:
    """A window of documents as they are prepared; of a `part` both ends are cut and some tokens not supervised."""
    documents = []
    for text in texts:
        ids = tokenizer.encode_batch([text])[0].tolist()
        begin, end = ([] if mark is None else [mark] for mark in (tokenizer.bos_id, tokenizer.eos_id))
        documents.append(begin + ids + end)
    if part:
        documents[0] = documents[0][1:] if len(documents[0]) > 2 else documents[0]
        documents[-1] = documents[-1][:-1] if len(documents[-1]) > 2 else documents[-1]
    tokens = np.concatenate([np.array(ids, dtype=np.int32) for ids in documents])
    document = np.repeat(np.arange(len(documents)), [len(ids) for ids in documents]).astype(np.int16)
    supervised = np.diff(document, prepend=-1) == 0
    if part:
        supervised &= chance.random(len(tokens)) < 0.8
    return Sample("general", tokens, supervised, document)


def pieces(sample: Sample, chunk: np.ndarray, number: int, tokenizer: Tokenizer) -> tuple[bytes, set[int]]:
    """The bytes of a chunk's tokens and their documents; end tokens are told by one sign."""
    table, rows = token_bytes(tokenizer), np.flatnonzero(sample.supervised)[chunk == number]
    assert rows.tolist() == list(range(rows[0], rows[0] + len(rows))), "a chunk's tokens follow each other"
    spelt = table.spell(sample.tokens[rows])
    for mark in (b"</s>", b"<|end|>"):
        spelt = spelt.replace(mark, b"\2")
    return spelt, set(sample.document[rows].tolist())


@settings(max_examples=60)
@given(texts=st.lists(TEXT, min_size=1, max_size=3), part=st.booleans(), seed=st.integers(0, 9), data=st.data())
def test_chunks_spell_the_same_text_and_none_is_larger_than_it_must_be(
    folders: dict[str, Path], texts: list[str], part: bool, seed: int, data: st.DataObject
) -> None:
    left, right = (data.draw(st.sampled_from(SIDES)) for _ in range(2))
    teacher, student = Tokenizer.load(folders[left]), Tokenizer.load(folders[right])
    sample = sample_of(teacher, texts, np.random.default_rng(seed), part)
    aligned = Aligner(teacher, student).align(sample)
    own = aligned.sample
    assert not own.supervised[np.diff(own.document, prepend=-1) != 0].any(), "nothing comes before a first token"
    assert len(aligned.teacher_chunk) == sample.supervised.sum() and len(aligned.student_chunk) == own.supervised.sum()
    for number in range(aligned.num_chunks):
        mine, mine_in = pieces(sample, aligned.teacher_chunk, number, teacher)
        other, other_in = pieces(own, aligned.student_chunk, number, student)
        # The space that SentencePiece puts before a text is no text.
        same = {mine, b" " + mine, mine.removeprefix(b" ")} if "piece" in (left, right) else {mine}
        assert mine and other in same
        assert mine_in == other_in and len(mine_in) == 1
    own_words = [w for w in np.unique(aligned.teacher_chunk) if w >= 0]
    assert own_words == list(range(aligned.num_chunks)) == [w for w in np.unique(aligned.student_chunk) if w >= 0]
    if left == right and not part:
        # The same tokens on both sides: each is a chunk by itself, but those that nothing comes before.
        assert (aligned.teacher_chunk >= 0).all() and aligned.num_chunks == sample.supervised.sum()
        assert aligned.pairs.tolist() == [[n, n] for n in range(aligned.num_chunks)]
        assert np.array_equal(own.tokens, sample.tokens)
        assert aligned.num_bytes == aligned.num_own_bytes


@given(cuts=st.lists(st.lists(st.integers(1, 4), min_size=1, max_size=9), min_size=2, max_size=2), data=st.data())
def test_an_overlay_is_what_walking_along_the_text_finds(cuts: list[list[int]], data: st.DataObject) -> None:
    sides = []
    for lengths in cuts:
        ends = np.cumsum(lengths)
        sides.append(np.stack([ends - lengths, ends], axis=1))
    counted = [np.array(data.draw(st.lists(st.booleans(), min_size=len(s), max_size=len(s)))) for s in sides]
    found = overlay(sides[0], sides[1], counted[0], counted[1])
    walked: list[tuple[list[int], list[int]]] = []
    at, open_ = [0, 0], ([], [])
    for byte in range(1, int(max(side[-1, 1] for side in sides)) + 1):
        closes = []
        for n, side in enumerate(sides):
            ended = at[n] < len(side) and side[at[n], 1] == byte
            if ended:
                open_[n].append(at[n])
                at[n] += 1
            closes.append(ended)
        if all(closes):
            walked.append(open_)
            open_ = ([], [])
    valid = []
    for chunk in walked:
        sizes = [sum(int(sides[n][i, 1] - sides[n][i, 0]) for i in chunk[n]) for n in (0, 1)]
        if sizes[0] == sizes[1] and all(counted[n][i] for n in (0, 1) for i in chunk[n]):
            valid.append(chunk)
    assert found.num_chunks == len(valid)
    for number, chunk in enumerate(valid):
        assert (np.flatnonzero(found.left == number).tolist(), np.flatnonzero(found.right == number).tolist()) == chunk
    pairs = [
        [i, j]
        for i in range(len(sides[0]))
        for j in range(len(sides[1]))
        if counted[0][i] and counted[1][j] and sides[0][i, 0] == sides[1][j, 0]
    ]
    assert found.starts.tolist() == pairs


def test_a_sentence_by_hand(folders: dict[str, Path]) -> None:
    teacher = Tokenizer.load(folders["coarse"])
    sample = sample_of(teacher, ["the fox"], np.random.default_rng(0), False)
    words = [teacher.token_text(i) for i in sample.tokens]
    assert words == ["the", " fox", "<|end|>"]
    aligned = aligner(folders, "coarse", "fine").align(sample)
    assert token_bytes(Tokenizer.load(folders["fine"])).spell(aligned.sample.tokens) == b"the fox<|end|>"
    # Nobody learns the first word, which the teacher cannot predict; the next is one token there and four here.
    assert aligned.sample.supervised.tolist() == [False] * 3 + [True] * 5
    assert aligned.teacher_chunk.tolist() == [0, 1]
    assert aligned.student_chunk.tolist() == [0, 0, 0, 0, 1]
    assert aligned.pairs.tolist() == [[0, 0], [1, 4]]
    assert (aligned.num_bytes, aligned.num_own_bytes) == (4, 4)


def test_a_first_token_that_holds_text_to_be_learnt_is_not_learnt(folders: dict[str, Path]) -> None:
    sample = sample_of(Tokenizer.load(folders["fine"]), ["the fox"], np.random.default_rng(0), False)
    aligned = aligner(folders, "fine", "coarse").align(sample)
    assert aligned.sample.supervised.tolist() == [False, True, True]
    assert aligned.teacher_chunk.tolist() == [-1, -1, 0, 0, 0, 0, 1]
    assert aligned.student_chunk.tolist() == [0, 1]
    assert aligned.pairs.tolist() == [[2, 0], [6, 1]]
    assert (aligned.num_bytes, aligned.num_own_bytes) == (6, 4)


def test_what_the_student_has_no_room_for_is_left_out(folders: dict[str, Path]) -> None:
    teacher = Tokenizer.load(folders["coarse"])
    sample = sample_of(teacher, ["the fox and the lazy dog", "the dog"], np.random.default_rng(0), False)
    whole, short = (aligner(folders, "coarse", "fine", n).align(sample) for n in (100, 9))
    assert [(short.sample.document == n).sum() for n in (0, 1)] == [9, 8]
    assert short.num_chunks == 3 < whole.num_chunks
    assert short.teacher_chunk.tolist()[:2] == [0, -1]


def test_text_that_is_none_leaves_a_token_that_nobody_learns(folders: dict[str, Path]) -> None:
    fine = Tokenizer.load(folders["fine"])
    rest = fine.encode_batch(["é"])[0][1:]
    sample = Sample("general", np.repeat(rest, 3), np.array([False, True, True]), np.zeros(3, dtype=np.int16))
    aligned = aligner(folders, "fine", "coarse").align(sample)
    assert len(aligned.sample.tokens) == 1 and not aligned.sample.supervised.any() and aligned.num_chunks == 0
    assert (aligned.teacher_chunk == -1).all()


def test_samples_are_aligned_once(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    made_by, teacher = aligner(folders, "coarse", "fine"), Tokenizer.load(folders["coarse"])
    samples = [sample_of(teacher, [f"the fox {n}"], np.random.default_rng(0), False) for n in range(3)]
    made: list[Aligned] = [made_by.align(sample) for sample in samples]
    assert made_by.align(samples[0]) is made[0]
    monkeypatch.setattr(alignment, "CACHE_BYTES", 1)
    made_by.align(sample_of(teacher, ["the dog"], np.random.default_rng(0), False))
    assert made_by.align(samples[0]) is not made[0]
    copy = pickle.loads(pickle.dumps(made_by)).align(samples[1])  # noqa: S301 - our own bytes
    assert copy.teacher_chunk.tolist() == made[1].teacher_chunk.tolist()
