"""Continues prompts token by token. What is drawn for a completion depends on its seed alone, not on its batch.

All ranks of a replica walk in step: whole or tensor-parallel models compute the same rows on every rank, and rank 0's
choice counts; under ZeRO-3 each rank has rows of its own and goes on, with a dummy, until the last one is done.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from inspect import signature
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from storage.samples import Int32Array


@dataclass(frozen=True)
class Decoding:
    """How completions are drawn, and where they end."""

    max_tokens: int
    temperature: float
    """0 takes the likeliest token."""
    top_p: float
    """Nucleus: the fewest tokens that together have this probability (Holtzman et al., 2020)."""
    vocab_size: int
    """Ids from here on are padding of the output head and never drawn."""
    end_ids: frozenset[int]
    stop: tuple[str, ...] = ()
    """Texts that end a completion; they are not part of it."""
    max_positions: int | None = None
    """Most tokens of a prompt and its completion."""


@dataclass(frozen=True)
class Ranks:
    """How the ranks of a replica keep in step."""

    agree: Callable[[Tensor], Tensor] = lambda ids: ids
    """Returns rank 0's ids where all ranks compute the same rows."""
    any_busy: Callable[[bool], bool] = lambda busy: busy
    """Tells whether some rank has rows left, where each has its own."""


@dataclass
class Completion:
    """A completion while it grows, and in the end."""

    prompt: Int32Array
    seed: bytes
    """16 bytes, of which its draws are a pure function."""
    ids: list[int] = field(default_factory=list)
    text: str = ""
    """Set at the end, without what stopped it."""
    finish_reason: str | None = None
    """`stop`, `length`, or `not_finite`: the model's logits were no numbers."""

    def __post_init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Begin anew."""
        self.ids, self.text, self.finish_reason = [], "", None
        self._chance = np.random.Generator(np.random.Philox(key=int.from_bytes(self.seed, "big")))

    def uniform(self) -> float:
        """Return the next random number of this completion, in [0, 1)."""
        return float(self._chance.random())


@torch.no_grad()
def complete(
    model: nn.Module,
    rows: Sequence[Completion],
    how: Decoding,
    decode: Callable[[Sequence[int]], str],
    device: torch.device,
    ranks: Ranks = Ranks(),
    on_step: Callable[[], None] = lambda: None,
) -> None:
    """Bring all rows, one batch, to their end; `on_step` is called after each token. `decode` gives the text of ids.

    Every prompt has at least one token and leaves room for another.
    """
    batch = _Batch(model, list(rows), device) if rows else None
    while ranks.any_busy(batch is not None):
        if batch is None:
            _dummy(model, device)
        else:
            logits = batch.forward()
            _extend(batch.rows, logits, how, decode, ranks)
            batch = batch.without_finished()
        on_step()


def _extend(
    rows: Sequence[Completion],
    logits_NV: Tensor,
    how: Decoding,
    decode: Callable[[Sequence[int]], str],
    ranks: Ranks,
) -> None:
    """Draw the next token of each row that is not finished, and finish those that it ends."""
    logits_NV = logits_NV[:, : how.vocab_size].float()
    finite = torch.isfinite(logits_NV.amax(-1))
    uniform = torch.tensor([row.uniform() for row in rows], dtype=torch.float64, device=logits_NV.device)
    ids = choose(torch.where(finite[:, None], logits_NV, 0.0), uniform, how.temperature, how.top_p)
    agreed = ranks.agree(torch.where(finite, ids, -1)).tolist()
    for row, token in zip(rows, agreed, strict=True):
        if row.finish_reason is None:
            _append(row, token, how, decode)


def _append(row: Completion, token: int, how: Decoding, decode: Callable[[Sequence[int]], str]) -> None:
    if token < 0:
        row.finish_reason = "not_finite"
        return
    if token in how.end_ids:
        row.finish_reason, row.text = "stop", decode(row.ids)
        return
    row.ids.append(token)
    if how.stop:
        # A stop text of n characters lies within the last n tokens, and the one before may end in half a character.
        longest = max(map(len, how.stop))
        if any(stop in decode(row.ids[-longest - 1 :]) for stop in how.stop):
            text = decode(row.ids)
            found = [at for stop in how.stop if (at := text.find(stop)) >= 0]
            if found:
                row.finish_reason, row.text = "stop", text[: min(found)]
                return
    room = how.max_positions is None or len(row.prompt) + len(row.ids) < how.max_positions
    if len(row.ids) >= how.max_tokens or not room:
        row.finish_reason, row.text = "length", decode(row.ids)


def choose(logits_NV: Tensor, uniform_N: Tensor, temperature: float, top_p: float) -> Tensor:
    """Return a token id for each row, int64 [N], by inversion of its nucleus' distribution at `uniform_N`.

    Equal chances are ordered by id, so that the choice is a function of logits and number alone.
    """
    if temperature == 0:
        return logits_NV.argmax(-1)
    chance_NV, ids_NV = torch.softmax(logits_NV.double() / temperature, -1).sort(dim=-1, descending=True, stable=True)
    sum_NV = chance_NV.cumsum(-1)
    # The nucleus ends with the token that reaches top_p: all before it have less together.
    nucleus_N = torch.where(sum_NV - chance_NV < top_p, sum_NV, 0.0).amax(-1)
    at_N = torch.searchsorted(sum_NV, (uniform_N * nucleus_N)[:, None], right=True)
    return ids_NV.gather(-1, at_N.clamp_(max=logits_NV.shape[-1] - 1))[:, 0]


class _Batch:
    """Rows with their cache of keys and values; prompts are padded on the left."""

    def __init__(self, model: nn.Module, rows: list[Completion], device: torch.device) -> None:
        from transformers import DynamicCache

        self.rows, self._model, self._device = rows, model, device
        longest = max(len(row.prompt) for row in rows)
        ids = np.zeros((len(rows), longest), dtype=np.int64)
        mask = np.zeros((len(rows), longest), dtype=np.int64)
        for n, row in enumerate(rows):
            ids[n, longest - len(row.prompt) :] = row.prompt
            mask[n, longest - len(row.prompt) :] = 1
        self._input = torch.from_numpy(ids).to(device)
        self._mask = torch.from_numpy(mask).to(device)
        self._cache = DynamicCache(config=getattr(model, "config", None))
        # Of a prompt only the last logits are needed: all of them would be the largest tensor by far.
        self._last_only: dict[str, Any] = (
            {"logits_to_keep": 1} if "logits_to_keep" in signature(model.forward).parameters else {}
        )

    def forward(self) -> Tensor:
        """Return the logits that predict each row's next token, [N, W]."""
        positions = (self._mask.cumsum(-1) - 1).clamp_(min=0)[:, -self._input.shape[1] :]
        output = self._model(
            input_ids=self._input,
            attention_mask=self._mask,
            position_ids=positions,
            past_key_values=self._cache,
            use_cache=True,
            **self._last_only,
        )
        logits: Tensor = output.logits[:, -1]
        return logits

    def without_finished(self) -> "_Batch | None":
        """Take the rows' newest tokens as the next input; once half of the rows are finished, go on without them."""
        open_ = [n for n, row in enumerate(self.rows) if row.finish_reason is None]
        if not open_:
            return None
        if 2 * len(open_) <= len(self.rows):
            index = torch.tensor(open_, device=self._device)
            self.rows = [self.rows[n] for n in open_]
            self._mask = self._mask[index]
            self._cache.batch_select_indices(index)
        newest = [row.ids[-1] if row.ids else 0 for row in self.rows]
        self._input = torch.tensor(newest, device=self._device)[:, None]
        self._mask = torch.nn.functional.pad(self._mask, (0, 1), value=1)
        return self


def _dummy(model: nn.Module, device: torch.device) -> None:
    """Run one token: under ZeRO-3 every rank must gather the weights as often as any other."""
    model(input_ids=torch.zeros((1, 1), dtype=torch.int64, device=device), use_cache=False)
