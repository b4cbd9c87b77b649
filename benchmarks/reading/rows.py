"""Made-up rows of the kind `hybrid`: 12 exact entries and 12 draws at each position, ids as uneven as words are."""

import numpy as np

from storage.identity import CaptureIdentity, DatasetIdentity, TeacherIdentity, TokenizerIdentity
from storage.samples import Sample, SampleBatch, offsets_of
from storage.targets import TargetBatch

VOCAB_SIZE = 151_936
TOP_K = 12
DRAWS = 12


def identity(vocab_size: int = VOCAB_SIZE) -> DatasetIdentity:
    """Return the identity of the benchmark's datasets."""
    return DatasetIdentity(
        teacher=TeacherIdentity(name="made up", architecture="Qwen2ForCausalLM", weights="ab" * 32, parameters=1),
        tokenizer=TokenizerIdentity(digest="cd" * 32, vocab_size=vocab_size),
        precision="bfloat16",
        capture=CaptureIdentity(kind="hybrid", top_k=TOP_K, draws=DRAWS, seed=0),
    )


def make_rows(
    num_samples: int, window_tokens: int, seed: int, vocab_size: int = VOCAB_SIZE
) -> tuple[SampleBatch, TargetBatch]:
    """Return whole windows, all positions but the first supervised, with their targets."""
    rng = np.random.default_rng(seed)
    samples = SampleBatch.of([_window(window_tokens, rng, vocab_size) for _ in range(num_samples)])
    positions = num_samples * (window_tokens - 1)
    distinct = rng.integers(8, DRAWS + 1, positions)  # of the drawn tokens
    count = (TOP_K + distinct).astype(np.int32)
    offsets = offsets_of(count.astype(np.int64))
    row = np.repeat(np.arange(positions), count)
    rank = np.arange(offsets[-1]) - offsets[row]
    # Ids: a few steps up from a frequent token, so that none comes twice at a position.
    steps = np.minimum(rng.zipf(1.3, offsets[-1]), vocab_size // 37)
    climbed = np.cumsum(steps)
    start = np.minimum(rng.zipf(1.2, positions), vocab_size // 3)
    ids = (start[row] + climbed - climbed[offsets[row]]).astype(np.int32)
    weight = 1.0 / (1.0 + rank) ** (1.0 + 1.5 * rng.random(positions))[row]
    total = np.bincount(row, weights=weight)
    tail = (0.02 * rng.random(positions)).astype(np.float16)
    logprob = np.log(weight / total[row] * (1.0 - tail.astype(np.float64)[row])).astype(np.float16)
    draws = (rank >= TOP_K).astype(np.uint8)
    draws[offsets[:-1] + TOP_K] += (DRAWS - distinct).astype(np.uint8)
    return samples, TargetBatch(
        offsets=offsets_of(np.full(num_samples, window_tokens - 1)),
        count=count,
        id=ids,
        logprob=logprob,
        draws=draws[None],
        tail_mass=tail,
        teacher_nll=rng.random(num_samples).astype(np.float32),
        teacher_entropy=rng.random(num_samples).astype(np.float32),
    )


def _window(length: int, rng: np.random.Generator, vocab_size: int) -> Sample:
    supervised = np.ones(length, dtype=np.bool_)
    supervised[0] = False
    tokens = np.minimum(rng.zipf(1.2, length), vocab_size - 1).astype(np.int32)
    return Sample("general", tokens, supervised, np.zeros(length, dtype=np.int16))
