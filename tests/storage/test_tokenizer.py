"""Tokenizers read from a folder, and their chat templates."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from tiny_tokenizers import CHAT, SPECIAL, write_tokenizer

from storage.errors import InputError
from storage.tokenizer import Tokenizer

CORPUS = ["the quick brown fox jumps over the lazy dog", "def quick(fox):\n    return the(lazy, dog)\n"] * 20
CHATTER = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "say hi"},
    {"role": "assistant", "content": "hi"},
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_tokenizer(tmp_path / "tok", CORPUS)


def edit(folder: Path, name: str, **changes: object) -> None:
    path = folder / name
    parsed = json.loads(path.read_text())
    parsed.update(changes)
    path.write_text(json.dumps(parsed))


def test_text_survives_the_round_trip(folder: Path) -> None:
    tokenizer = Tokenizer.load(folder)
    text = "the quick héllo 世界 🦊 dog<|end|>"
    ids, starts = tokenizer.encode_with_offsets(text)
    assert ids.dtype == np.int32 and starts.dtype == np.int32
    assert tokenizer.decode(ids) == text
    assert ids[-1] == tokenizer.eos_id == SPECIAL.index("<|end|>")
    np.testing.assert_array_equal(tokenizer.encode_batch([text, ""])[0], ids)
    assert tokenizer.vocab_size > len(SPECIAL) + 256
    assert tokenizer.token_text(tokenizer.vocab_size - 1) != f"<{tokenizer.vocab_size - 1}>"
    assert tokenizer.token_text(tokenizer.vocab_size) == f"<{tokenizer.vocab_size}>"


def test_spans_tile_the_text_even_where_the_tokenizer_trims_spaces(tmp_path: Path) -> None:
    text = "the  lazy   dog\n    return the quick fox "
    trimmed = Tokenizer.load(write_tokenizer(tmp_path / "t", CORPUS, trim=True))
    plain = Tokenizer.load(write_tokenizer(tmp_path / "p", CORPUS, trim=False))
    ids, spans = trimmed.encode_with_spans(text)
    assert spans[0, 0] == 0 and spans[-1, 1] == len(text)
    np.testing.assert_array_equal(spans[1:, 0], spans[:-1, 1])
    assert [trimmed.decode([i]) for i in ids] == [text[a:b] for a, b in spans]
    np.testing.assert_array_equal(ids, plain.encode_batch([text])[0])


def test_vocab_size_counts_added_tokens(folder: Path) -> None:
    before = Tokenizer.load(folder)
    added = json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
    new = {**added[0], "id": before.vocab_size + 2, "content": "<|extra|>"}
    edit(folder, "tokenizer.json", added_tokens=[*added, new])
    after = Tokenizer.load(folder)
    assert after.vocab_size > before.vocab_size
    assert after.digest != before.digest


def test_digest_is_of_content_not_of_layout(folder: Path) -> None:
    path = folder / "tokenizer.json"
    digest = Tokenizer.load(folder).digest
    parsed = json.loads(path.read_text())
    merges = parsed["model"]["merges"]
    parsed["model"]["merges"] = [" ".join(pair) for pair in merges]
    parsed["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    path.write_text(json.dumps(dict(reversed(parsed.items())), indent=4))
    again = Tokenizer.load(folder)
    assert again.digest == digest
    assert len(again.encode_batch(["the quick brown fox jumps over"])[0]) > 3, "truncation must be off"
    parsed["model"]["merges"] = merges[:-1]
    path.write_text(json.dumps(parsed))
    assert Tokenizer.load(folder).digest != digest


def test_token_text_shows_every_token(folder: Path) -> None:
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.token_text(tokenizer.encode_batch([" quick"])[0][0]) == " quick"
    assert tokenizer.token_text(0) == "<|end|>"
    assert tokenizer.token_text(10**6) == "<1000000>"
    part_of_a_character = tokenizer.encode_batch(["世"])[0][0]
    shown = tokenizer.token_text(part_of_a_character)
    assert shown and "\ufffd" not in shown


def test_start_token_follows_the_tokenizers_own_habit(tmp_path: Path) -> None:
    begin = SPECIAL.index("<|begin|>")
    assert Tokenizer.load(write_tokenizer(tmp_path / "a", bos_token="<|begin|>")).bos_id is None
    with_flag = write_tokenizer(tmp_path / "b", bos_token={"content": "<|begin|>"}, add_bos_token=True)
    assert Tokenizer.load(with_flag).bos_id == begin
    post = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<|begin|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"<|begin|>": {"id": "<|begin|>", "ids": [begin], "tokens": ["<|begin|>"]}},
    }
    by_itself = write_tokenizer(tmp_path / "c", bos_token="<|begin|>")
    edit(by_itself, "tokenizer.json", post_processor=post)
    assert Tokenizer.load(by_itself).bos_id == begin
    edit(by_itself, "tokenizer_config.json", add_bos_token=False)
    assert Tokenizer.load(by_itself).bos_id is None


def test_chat_template_comes_from_argument_file_or_config(folder: Path) -> None:
    assert Tokenizer.load(folder).render_chat(CHATTER[1:], False) == "<|user|>say hi<|end|><|assistant|>hi<|end|>"
    assert Tokenizer.load(folder).render_chat(CHATTER[1:2], True) == "<|user|>say hi<|end|><|assistant|>"
    edit(
        folder,
        "tokenizer_config.json",
        chat_template=[{"name": "tool", "template": "x"}, {"name": "default", "template": "D"}],
    )
    assert Tokenizer.load(folder).render_chat(CHATTER) == "D"
    (folder / "chat_template.jinja").write_text("F")
    assert Tokenizer.load(folder).render_chat(CHATTER) == "F"
    assert Tokenizer.load(folder, "A").render_chat(CHATTER) == "A"


def test_templates_may_use_what_published_ones_use(folder: Path) -> None:
    template = (
        "{%- for m in messages %}\n"
        "    {%- if m.role == 'system' %}{% continue %}{% endif %}\n"
        "    {%- generation %}{{ {'c': m.content + '<'} | tojson }}{% endgeneration %}\n"
        "{%- endfor %}\n"
        "{%- if strftime_now is defined %}{{ strftime_now('%Y') }}{% endif %}"
    )
    assert Tokenizer.load(folder, template).render_chat(CHATTER[:2]) == '{"c": "say hi<"}'


def test_templates_run_in_a_sandbox(folder: Path) -> None:
    escape = "{{ messages.__class__.__mro__[1].__subclasses__() }}"
    with pytest.raises(InputError, match="chat template refuses"):
        Tokenizer.load(folder, escape).render_chat(CHATTER)
    with pytest.raises(InputError, match="chat template refuses"):
        Tokenizer.load(folder, "{% set x = messages.append(1) %}").render_chat(CHATTER)


def test_template_errors_are_explained(folder: Path) -> None:
    with pytest.raises(InputError, match="only users may speak"):
        Tokenizer.load(folder, "{{ raise_exception('only users may speak') }}").render_chat(CHATTER)
    with pytest.raises(InputError, match="malformed at its line 2"):
        Tokenizer.load(folder, "a\n{% for %}")
    edit(folder, "tokenizer_config.json", chat_template=None)
    with pytest.raises(InputError, match=r"no chat template; set data\.chat_template"):
        Tokenizer.load(folder).render_chat(CHATTER)


def test_missing_and_malformed_files_are_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"empty/tokenizer\.json does not exist"):
        Tokenizer.load(tmp_path / "empty")
    edit(folder, "tokenizer_config.json", eos_token="<|nowhere|>")
    with pytest.raises(InputError, match=r"eos_token '<\|nowhere\|>' is not in the vocabulary"):
        Tokenizer.load(folder)
    (folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(InputError, match=r"tokenizer_config\.json:1: not JSON"):
        Tokenizer.load(folder)
    (folder / "tokenizer.json").write_text('{"model": 3}')
    (folder / "tokenizer_config.json").write_text("{}")
    with pytest.raises(InputError, match=r"tokenizer\.json cannot be read"):
        Tokenizer.load(folder)


def test_survives_pickling(folder: Path) -> None:
    tokenizer = Tokenizer.load(folder)
    tokenizer.render_chat(CHATTER)
    copy = pickle.loads(pickle.dumps(tokenizer))  # noqa: S301 - our own bytes
    assert copy.render_chat(CHATTER) == tokenizer.render_chat(CHATTER)
    assert copy.digest == tokenizer.digest


@pytest.mark.slow
def test_agrees_with_transformers(folder: Path) -> None:
    from transformers import AutoTokenizer

    edit(folder, "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast", chat_template=CHAT)
    theirs = AutoTokenizer.from_pretrained(folder)
    ours = Tokenizer.load(folder)
    for add_generation_prompt in (False, True):
        text = ours.render_chat(CHATTER, add_generation_prompt)
        assert text == theirs.apply_chat_template(CHATTER, tokenize=False, add_generation_prompt=add_generation_prompt)
        expected = theirs(text, add_special_tokens=False)["input_ids"]
        assert ours.encode_batch([text])[0].tolist() == expected
    assert ours.eos_id == theirs.eos_token_id
    assert ours.vocab_size == len(theirs)
