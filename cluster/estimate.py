"""What a supervised token will take on disk, before anything is scored.

The constants are compressed bytes of the quickstart's teacher (vocabulary 4,096, 4.9 nats per token), measured column
by column. Draws cost by how many differ: a sharper teacher repeats them, and its datasets of kind `sampled` are
smaller. As soon as a dataset holds something, its own bytes per token count instead.
"""

import math

from storage.config import CacheConfig
from storage.identity import DRAWN_KINDS, HEAD_KINDS

ENTRY_BYTES = {
    "plain": {"dense": 1.5, "topk": 2.35, "hybrid": 2.73, "hybrid_counts": 1.85, "sampled": 1.0},
    "compact": {"topk": 1.1, "hybrid": 1.66, "hybrid_counts": 1.12, "sampled": 0.67},
}
"""Of one kept or drawn entry, all `target_*` columns but the tail, by codec and kind. Log-probabilities of drawn tokens
take more than those of the best, which fall off smoothly."""
ID_BYTES_PER_BIT = 0.1
"""Further bytes of an entry for each bit of the vocabulary's size beyond `MEASURED_BITS`."""
MEASURED_BITS = 12
TOKEN_BYTES = 1.25
"""Of a token itself, its masks, and the sample's own columns."""
TAIL_BYTES = 1.6
"""Of `tail_mass`, which codec `compact` packs with the entries and other kinds do without."""
HIDDEN_BYTES = 2.0
"""Of one number of a hidden state."""


def bytes_per_token(
    cache: CacheConfig, vocab_size: int, hidden_width: int = 0, tokens_per_position: float = 1.0
) -> float:
    """Return the bytes of a supervised token of a dataset of these settings.

    Args:
        vocab_size: of the tokenizer; of a classifier its number of classes.
        hidden_width: of the teacher's hidden states; counts where `cache.hidden` names layers.
        tokens_per_position: tokens that are stored for a supervised one; many where a text has one class.
    """
    draws = cache.draws * cache.draw_sets
    kept = cache.top_k * (cache.kind in HEAD_KINDS) + draws * (cache.kind in DRAWN_KINDS)
    entries = vocab_size if cache.kind == "dense" else min(kept, vocab_size)
    found = TOKEN_BYTES * tokens_per_position + HIDDEN_BYTES * hidden_width * len(set(cache.hidden))
    if entries:
        ids = 0.0 if cache.kind == "dense" else ID_BYTES_PER_BIT * max(math.log2(vocab_size) - MEASURED_BITS, 0.0)
        found += entries * (ENTRY_BYTES[cache.codec][cache.kind] + ids)
    if cache.codec == "plain" and cache.kind in {"topk", "hybrid"}:
        found += TAIL_BYTES
    return found
