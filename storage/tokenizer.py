"""A tokenizer from a local folder, read with the `tokenizers` library alone, and its chat template."""

import json
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any, Self

import numpy as np
import tokenizers
from numpy.typing import NDArray

from storage.chat_template import ChatTemplate
from storage.errors import InputError

Int32Array = NDArray[np.int32]


class Tokenizer:
    """Text to token ids and back.

    Attributes:
        folder: where it was loaded from.
        vocab_size: largest token id + 1, added tokens included; a model's padded vocabulary may be larger.
        digest: hex BLAKE2b (32 bytes) of the canonical content of `tokenizer.json`; equal digests give equal ids.
        chat_template: Jinja source of the chat template, or None.
        special_tokens: the named ones (`eos_token`, …) as text; chat templates use them.
        bos_id: id that the tokenizer itself puts before a document (an encoder's is `cls_token`), or None.
        eos_id: id that ends a document (an encoder's is `sep_token`), or None.
    """

    def __init__(self, folder: Path, content: str, config: Mapping[str, Any], chat_template: str | None) -> None:
        """Build from the text of `tokenizer.json` and the parsed `tokenizer_config.json`; see `load`."""
        self.folder = folder
        parsed = _parse_json(content, folder / "tokenizer.json")
        self._engine = _engine(parsed, folder)
        self.vocab_size: int = max(self._engine.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        self.digest = _digest(parsed)
        self.chat_template = chat_template
        self.special_tokens = _special_tokens(config)
        self.eos_id = self._id_of("eos_token" if "eos_token" in self.special_tokens else "sep_token")
        self.bos_id = self._leading_bos(config)
        self._chat = ChatTemplate(chat_template, self.special_tokens) if chat_template is not None else None

    @classmethod
    def load(cls, folder: str | Path, chat_template: str | None = None) -> Self:
        """Load from a local folder that holds `tokenizer.json`.

        Args:
            folder: a model or tokenizer folder as `save_pretrained` writes it; `tokenizer_config.json` and
                `chat_template.jinja` are read where present.
            chat_template: Jinja source that replaces the folder's own template.

        Raises:
            InputError: a file is missing or malformed, or a special token is not in the vocabulary.
        """
        root = Path(folder)
        path = root / "tokenizer.json"
        if not path.is_file():
            raise InputError(
                f"{path} does not exist; give a folder with a tokenizer.json "
                "(AutoTokenizer.from_pretrained(…).save_pretrained(folder) writes one)"
            )
        config = _read_json(root / "tokenizer_config.json")
        template = chat_template if chat_template is not None else _own_template(root, config)
        tokenizer = cls(root, _read_text(path), config, template)
        if chat_template is not None and tokenizer._chat is not None:
            tokenizer._chat.compile()  # what the user wrote is checked at once
        return tokenizer

    def content(self) -> dict[str, Any]:
        """Return what `tokenizer.json` says: model, decoder, added tokens."""
        return dict(json.loads(self._engine.to_str()))

    def encode_with_offsets(self, text: str) -> tuple[Int32Array, Int32Array]:
        """Return the token ids of `text` and the character at which each begins, both int32[n]."""
        ids, spans = self.encode_with_spans(text)
        return ids, spans[:, 0]

    def encode_with_spans(self, text: str) -> tuple[Int32Array, Int32Array]:
        """Return the token ids of `text`, int32[n], and the characters `start:end` that each stands for, int32[n, 2].

        A token's leading space counts as its own. Tokens that are parts of one character all span it. Special tokens
        written in the text are recognised; none is added.
        """
        encoding = self._engine.encode(text, add_special_tokens=False)
        spans = np.asarray(encoding.offsets, dtype=np.int32).reshape(-1, 2)
        return np.asarray(encoding.ids, dtype=np.int32), spans

    def encode_batch(self, texts: Sequence[str]) -> list[Int32Array]:
        """Return the token ids of each text, int32[n]; special tokens are recognised, none is added."""
        encodings = self._engine.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.asarray(encoding.ids, dtype=np.int32) for encoding in encodings]

    def decode(self, ids: Sequence[int] | NDArray[np.integer[Any]]) -> str:
        """Return the text of `ids`, special tokens included."""
        return str(self._engine.decode([int(i) for i in ids], skip_special_tokens=False))

    def token_text(self, token_id: int) -> str:
        """Return one token for display: its text, or its vocabulary entry where it is not text by itself."""
        entry = self._engine.id_to_token(int(token_id))
        if entry is None:
            return f"<{token_id}>"
        if entry.startswith("▁"):  # the decoder would strip this space
            return str(entry.replace("▁", " "))
        text = self.decode([token_id])
        return text if text and "\ufffd" not in text else str(entry)

    def render_chat(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = False) -> str:
        """Return the text of `messages` under the chat template.

        Raises:
            InputError: there is no template, or it refuses the messages.
        """
        if self._chat is None:
            raise InputError(f"the tokenizer in {self.folder} has no chat template; set data.chat_template")
        return self._chat.render(messages, add_generation_prompt)

    def _id_of(self, name: str) -> int | None:
        token = self.special_tokens.get(name)
        if token is None:
            return None
        found = self._engine.token_to_id(token)
        if found is None:
            raise InputError(f"{self.folder}/tokenizer_config.json: {name} {token!r} is not in the vocabulary")
        return int(found)

    def _leading_bos(self, config: Mapping[str, Any]) -> int | None:
        """Id put before a document: as `add_bos_token` says, else what the post-processor does."""
        bos = self._id_of("bos_token" if "bos_token" in self.special_tokens else "cls_token")
        if config.get("add_bos_token") is False or bos is None:
            return None
        added = self._engine.encode("a", add_special_tokens=True).ids
        return bos if config.get("add_bos_token") is True or added[0] == bos else None


def _engine(parsed: Mapping[str, Any], folder: Path) -> tokenizers.Tokenizer:
    untrimmed = {**parsed, "post_processor": _without_trimming(parsed.get("post_processor"))}
    try:
        engine = tokenizers.Tokenizer.from_str(json.dumps(untrimmed))
    except Exception as error:  # the library raises bare Exception
        raise InputError(f"{folder}/tokenizer.json cannot be read: {error}") from error
    engine.no_truncation()  # the file may carry both; they would cut or pad documents unseen
    engine.no_padding()
    return engine


def _without_trimming(node: Any) -> Any:
    """The post-processor with offsets that include a token's spaces: spans of text are told by them. Ids stay."""
    if isinstance(node, dict):
        return {key: False if key == "trim_offsets" else _without_trimming(value) for key, value in node.items()}
    return [_without_trimming(value) for value in node] if isinstance(node, list) else node


def _digest(parsed: Mapping[str, Any]) -> str:
    """Digest of what decides ids: not of layout, nor of the two ways in which merges are written down."""
    kept = {key: value for key, value in parsed.items() if key not in ("truncation", "padding")}
    model = kept.get("model")
    if isinstance(model, dict) and isinstance(model.get("merges"), list):
        pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
        kept["model"] = {**model, "merges": pairs}
    canonical = json.dumps(kept, sort_keys=True, separators=(",", ":"))
    return blake2b(canonical.encode("ascii"), digest_size=32).hexdigest()


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """The named special tokens (`eos_token`, …) of a tokenizer config, as strings."""
    found = {}
    for key, value in config.items():
        content = value.get("content") if isinstance(value, dict) else value
        if key.endswith("_token") and isinstance(content, str):
            found[key] = content
    return found


def _own_template(root: Path, config: Mapping[str, Any]) -> str | None:
    path = root / "chat_template.jinja"
    if path.is_file():
        return _read_text(path)
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _read_json(path: Path) -> dict[str, Any]:
    return _parse_json(_read_text(path), path) if path.is_file() else {}


def _parse_json(content: str, path: Path) -> dict[str, Any]:
    try:
        parsed = json.loads(content)
    except json.JSONDecodeError as error:
        raise InputError(f"{path}:{error.lineno}: not JSON ({error.msg})") from error
    if not isinstance(parsed, dict):
        raise InputError(f"{path}: expected a JSON object, found {type(parsed).__name__}")
    return parsed


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error
