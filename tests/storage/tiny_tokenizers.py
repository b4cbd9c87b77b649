"""Tokenizers made on the spot: a byte-level one with a token per byte, and one with merges."""

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

SPECIAL = ["<|end|>", "<|begin|>", "<|user|>", "<|assistant|>", "<|system|>"]
CHAT = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def write_tokenizer(
    folder: Path,
    corpus: list[str] | None = None,
    chat: str | None = CHAT,
    trim: bool = False,
    merges: int = 200,
    lowercase: bool = False,
    **config: Any,
) -> Path:
    """Write a tokenizer folder; `corpus` gives it `merges`; `config` goes to tokenizer_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    engine = Tokenizer(models.BPE())
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if lowercase:
        engine.normalizer = normalizers.Lowercase()
    engine.decoder = decoders.ByteLevel()
    engine.post_processor = processors.ByteLevel(trim_offsets=trim)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=len(SPECIAL) + 256 + (merges if corpus else 0),
        special_tokens=SPECIAL,
        initial_alphabet=alphabet,
        show_progress=False,
    )
    engine.train_from_iterator(corpus or [], trainer)
    engine.save(str(folder / "tokenizer.json"))
    settings = {"eos_token": "<|end|>", "chat_template": chat, **config}
    kept = {key: value for key, value in settings.items() if value is not None}
    (folder / "tokenizer_config.json").write_text(json.dumps(kept))
    return folder


def write_sentence_piece(folder: Path, corpus: list[str] | None = None, merges: int = 100) -> Path:
    """Write a tokenizer as SentencePiece makes them: a space before every text, bytes where there is no token."""
    engine = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    engine.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    engine.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>"]
    every = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=len(special) + 256 + 40 + merges, special_tokens=[*special, *every], show_progress=False
    )
    engine.train_from_iterator(corpus or ["a b"], trainer)
    folder.mkdir(parents=True, exist_ok=True)
    parsed = json.loads(engine.to_str())
    parsed["added_tokens"] = parsed["added_tokens"][: len(special)]
    (folder / "tokenizer.json").write_text(json.dumps(parsed))
    (folder / "sentencepiece").touch()
    settings = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def write_word_piece(folder: Path) -> Path:
    """Write a tokenizer that forgets where spaces were."""
    engine = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1, "##b": 2}, unk_token="[UNK]"))
    engine.pre_tokenizer = pre_tokenizers.Whitespace()
    engine.decoder = decoders.WordPiece()
    folder.mkdir(parents=True, exist_ok=True)
    engine.save(str(folder / "tokenizer.json"))
    return folder
