"""Which tokens of a text, a chat or a completion the student must predict."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizers import SPECIAL, write_tokenizer

from storage.corpus import BadRowError, Document
from storage.encoding import assistant_spans, encode_documents, spans_mask
from storage.errors import InputError
from storage.packing import EncodedDocument
from storage.tokenizer import Tokenizer

CORPUS = ["the answer is forty two and the question is not known", "Q: why? A: because it is so"] * 30


@pytest.fixture(scope="module")
def bytewise(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.load(write_tokenizer(tmp_path_factory.mktemp("t") / "bytes"))


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.load(write_tokenizer(tmp_path_factory.mktemp("t") / "merged", CORPUS, trim=True))


def encode(tokenizer: Tokenizer, **fields: Any) -> EncodedDocument:
    ((_, encoded),) = encode_documents([Document("f:1", **fields)], tokenizer)
    assert isinstance(encoded, EncodedDocument), encoded
    return encoded


def learnt(tokenizer: Tokenizer, encoded: EncodedDocument) -> str:
    return tokenizer.decode(encoded.tokens[encoded.supervised])


def chat(*turns: str) -> tuple[dict[str, str], ...]:
    return tuple({"role": turn.partition(":")[0], "content": turn.partition(":")[2]} for turn in turns)


def test_text_ends_with_the_end_token_once(bytewise: Tokenizer) -> None:
    encoded = encode(bytewise, text="héllo")
    assert bytewise.decode(encoded.tokens) == "héllo<|end|>"
    assert encoded.supervised.all()
    assert bytewise.decode(encode(bytewise, text="x<|end|>").tokens) == "x<|end|>"


def test_start_token_is_put_before_and_never_supervised(tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path / "b", bos_token="<|begin|>", add_bos_token=True, eos_token=None)
    tokenizer = Tokenizer.load(folder)
    encoded = encode(tokenizer, text="ab")
    assert tokenizer.decode(encoded.tokens) == "<|begin|>ab"
    assert encoded.supervised.tolist() == [False, True, True]
    pair = encode(tokenizer, prompt="", completion="c")
    assert tokenizer.decode(pair.tokens) == "<|begin|>c" and pair.supervised.tolist() == [False, True]


def test_prompt_is_excluded(bytewise: Tokenizer) -> None:
    encoded = encode(bytewise, prompt="Q: 世? ", completion="A: 界")
    assert bytewise.decode(encoded.tokens) == "Q: 世? A: 界<|end|>"
    assert learnt(bytewise, encoded) == "A: 界<|end|>"


def test_a_token_across_the_border_counts_as_completion(merged: Tokenizer) -> None:
    ids, spans = merged.encode_with_spans("Q: why? A: because")
    assert any(a < 11 < b for a, b in spans), "the test wants a token that holds the prompt's space and a completion"
    encoded = encode(merged, prompt="Q: why? A: ", completion="because")
    assert learnt(merged, encoded) == " because<|end|>"
    np.testing.assert_array_equal(encoded.tokens[:-1], ids)


def test_chat_supervises_what_the_assistant_wrote(bytewise: Tokenizer) -> None:
    encoded = encode(bytewise, messages=chat("system:s", "user:one", "assistant:ONE", "user:two", "assistant:TWO"))
    expected = "<|system|>s<|end|><|user|>one<|end|><|assistant|>ONE<|end|><|user|>two<|end|><|assistant|>TWO<|end|>"
    assert bytewise.decode(encoded.tokens) == expected
    assert learnt(bytewise, encoded) == "ONE<|end|>TWO<|end|>"


TURNS = st.lists(
    st.tuples(st.sampled_from(["user", "assistant", "system"]), st.text("ab \né世🦊", max_size=12)),
    min_size=1,
    max_size=5,
)


@settings(max_examples=60)
@given(turns=TURNS)
def test_chat_mask_is_the_assistants_text_for_any_chat(merged: Tokenizer, turns: list[tuple[str, str]]) -> None:
    messages = tuple({"role": role, "content": content} for role, content in turns)
    text, spans = assistant_spans(merged, messages, "f:1")
    assert [text[a:b] for a, b in spans] == [content + "<|end|>" for role, content in turns if role == "assistant"]
    ids, token_spans = merged.encode_with_spans(text)
    mask = spans_mask(token_spans, spans)
    assert merged.decode(ids[mask]) == "".join(text[a:b] for a, b in spans)
    assert "<|assistant|>" not in merged.decode(ids[mask])


def test_plain_templates_are_told_apart_by_characters(merged: Tokenizer, tmp_path: Path) -> None:
    template = (
        "{% for m in messages %}{{ 'Q: ' if m.role == 'user' else 'A:' }}{{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}A:{% endif %}"
    )
    tokenizer = Tokenizer.load(merged.folder, template)
    encoded = encode(tokenizer, messages=chat("user:why?", "assistant: because it is", "user:so?"))
    assert tokenizer.decode(encoded.tokens) == "Q: why?\nA: because it is\nQ: so?\n"
    assert learnt(tokenizer, encoded) == " because it is\n"


UNSTABLE = [
    # Earlier reasoning is dropped once there is a later message.
    "{% for m in messages %}<|{{ m.role }}|>"
    "{{ m.content if loop.last or m.role == 'user' else m.content[-3:] }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}",
    # The generation prompt opens a block that the message itself does not.
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|><think>{% endif %}",
]


@pytest.mark.parametrize("template", UNSTABLE)
def test_templates_that_rewrite_earlier_text_are_refused(bytewise: Tokenizer, template: str) -> None:
    tokenizer = Tokenizer.load(bytewise.folder, template)
    messages = chat("user:one", "assistant:think ONE", "user:two", "assistant:think TWO")
    with pytest.raises(
        InputError, match=r"f:1: message 1: the chat template is not prefix-stable.*data\.chat_template"
    ):
        encode(tokenizer, messages=messages)


@pytest.mark.parametrize(
    "fields",
    [{"text": ""}, {"prompt": "p", "completion": ""}, {"messages": chat("user:hello", "user:anyone?")}],
)
def test_nothing_to_predict_is_a_bad_row(bytewise: Tokenizer, fields: dict[str, Any]) -> None:
    documents = [Document("f:1", text="good"), Document("f:2", **fields), Document("f:3", text="fine")]
    results = [encoded for _, encoded in encode_documents(documents, bytewise)]
    assert [type(result) for result in results] == [EncodedDocument, BadRowError, EncodedDocument]
    assert "no supervised token" in str(results[1])
    assert bytewise.decode(results[2].tokens) == "fine<|end|>"


def test_one_token_without_an_end_token_is_nothing_to_predict(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(write_tokenizer(tmp_path / "n", eos_token=None))
    ((_, encoded),) = encode_documents([Document("f:1", text="a")], tokenizer)
    assert isinstance(encoded, BadRowError)


def test_refused_messages_are_a_bad_row_and_a_missing_template_is_not(bytewise: Tokenizer, tmp_path: Path) -> None:
    strict = Tokenizer.load(bytewise.folder, "{{ raise_exception('roles must alternate') }}")
    ((_, encoded),) = encode_documents([Document("f:1", messages=chat("assistant:x"))], strict)
    assert isinstance(encoded, BadRowError) and "roles must alternate" in str(encoded)
    bare = Tokenizer.load(write_tokenizer(tmp_path / "bare", chat=None))
    with pytest.raises(InputError, match="has no chat template"):
        encode(bare, messages=chat("user:x", "assistant:y"))


def test_special_tokens_keep_their_ids(bytewise: Tokenizer) -> None:
    encoded = encode(bytewise, messages=chat("user:a", "assistant:b"))
    assert encoded.tokens.tolist()[0] == SPECIAL.index("<|user|>")
    assert encoded.tokens.tolist()[-1] == bytewise.eos_id


def test_given_tokens_stay_as_they_are(bytewise: Tokenizer) -> None:
    encoded = encode(bytewise, tokens=(5, 6, 7), supervised=(False, True, True))
    assert (encoded.tokens.tolist(), encoded.supervised.tolist()) == ([5, 6, 7], [False, True, True])
    for tokens in ((5, bytewise.vocab_size), (-1, 5)):
        document = Document("here", tokens=tokens, supervised=(False, True))
        ((_, problem),) = encode_documents([document], bytewise)
        assert "the tokenizer has" in str(problem)
