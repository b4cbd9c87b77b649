"""Where a model's completions end: what its folder says, and what the config adds. No torch."""

import json
from pathlib import Path
from typing import Any

from storage.errors import InputError
from storage.tokenizer import Tokenizer
from workers.api.config import GenerateConfig
from workers.model_folder import model_facts


def end_ids(folder: Path, tokenizer: Tokenizer) -> frozenset[int]:
    """Return the tokens that end a completion: those of generation_config.json or config.json, and the tokenizer's."""
    found = set() if tokenizer.eos_id is None else {tokenizer.eos_id}
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        try:
            named: Any = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id") if path.is_file() else None
        except (OSError, ValueError) as error:
            raise InputError(f"{path} cannot be read: {error}") from error
        if named is not None:
            found.update([named] if isinstance(named, int) else named)
            break
    return frozenset(found)


def decoding_settings(folder: Path, config: GenerateConfig, tokenizer: Tokenizer) -> Any:
    """Return the `decoding.Decoding` of a model folder and a config."""
    from workers.local.decoding import Decoding

    return Decoding(
        max_tokens=config.max_tokens,
        temperature=config.temperature,
        top_p=config.top_p,
        vocab_size=min(tokenizer.vocab_size, model_facts(folder).vocab_size),
        end_ids=end_ids(folder, tokenizer),
        stop=tuple(config.stop),
        max_positions=model_facts(folder).max_positions,
    )
