"""Documents → token ids and supervised masks, in batches."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import numpy as np

from storage.corpus import BadRowError, Document, Message
from storage.errors import InputError
from storage.packing import EncodedDocument, trim
from storage.samples import BoolArray, Int32Array
from storage.tokenizer import Tokenizer

Span = tuple[int, int]

NO_SUPERVISED = "no supervised token: nothing in it for the student to predict"


def encode_documents(
    documents: Sequence[Document], tokenizer: Tokenizer
) -> Iterator[tuple[Document, EncodedDocument | BadRowError]]:
    """Yield each document with its tokens, or with the reason why it has none to learn from.

    * text: all tokens supervised, between the tokenizer's own start token and its end-of-text token, if any;
    * prompt and completion: the same, but only the completion and the end-of-text token are supervised;
    * messages: what the chat template renders, supervised where the assistant speaks;
    * tokens: as they are.

    Raises:
        InputError: messages without a chat template, or a template under which the assistant's text cannot be told.
    """
    texts = [document.text for document in documents if document.text is not None]
    encoded_texts = iter(tokenizer.encode_batch(texts))
    for document in documents:
        try:
            if document.tokens is not None:
                encoded = _given_tokens(document, tokenizer)
            elif document.text is not None:
                tokens = next(encoded_texts)
                encoded = _enclosed(tokens, np.ones(len(tokens), dtype=np.bool_), tokenizer)
            elif document.messages is not None:
                encoded = _encode_chat(document, document.messages, tokenizer)
            else:
                encoded = _encode_completion(document.prompt or "", document.completion or "", tokenizer)
            if document.label is not None:
                label = np.broadcast_to(np.array(document.label, dtype=np.int32), len(encoded))
                encoded = replace(encoded, label=label)
            if not len(trim(encoded)):
                raise BadRowError(NO_SUPERVISED)
            yield document, encoded
        except BadRowError as problem:
            yield document, problem


def assistant_spans(tokenizer: Tokenizer, messages: Sequence[Message], where: str) -> tuple[str, list[Span]]:
    """Return the rendered chat and the character spans of it that the assistant wrote.

    An assistant message's span is what rendering it adds to the text that would prompt for it, so it holds the
    end-of-turn marks that the model must produce.

    Raises:
        BadRowError: the template refuses these messages.
        InputError: rendering more messages changes earlier text, so the spans cannot be told.
    """
    whole = _render(tokenizer, messages, False)
    spans = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = _render(tokenizer, messages[:index], True)
        after = _render(tokenizer, messages[: index + 1], False)
        if not after.startswith(before) or not whole.startswith(after):
            raise InputError(
                f"{where}: message {index}: the chat template is not prefix-stable: the text with the assistant's "
                "message does not begin with the text that prompts for it, so what the assistant wrote cannot be told "
                "from the prompt; set data.chat_template to one that only ever adds text (some templates drop earlier "
                "reasoning, or open a <think> block in the generation prompt)"
            )
        spans.append((len(before), len(after)))
    return whole, spans


def spans_mask(token_spans: Int32Array, spans: Iterable[Span]) -> BoolArray:
    """Return which tokens hold text of one of the character spans, bool[n].

    Args:
        token_spans: the characters `start:end` of each token, [n, 2].
        spans: the supervised text; a token that lies only partly within it counts, else its text would go unlearnt.
    """
    mask = np.zeros(len(token_spans), dtype=np.bool_)
    for start, end in spans:
        mask |= (token_spans[:, 0] < end) & (token_spans[:, 1] > start)
    return mask


def _given_tokens(document: Document, tokenizer: Tokenizer) -> EncodedDocument:
    tokens = np.array(document.tokens, dtype=np.int64)
    if len(tokens) and not 0 <= tokens.min() <= tokens.max() < tokenizer.vocab_size:
        raise BadRowError(f"token ids from {tokens.min()} to {tokens.max()}; the tokenizer has {tokenizer.vocab_size}")
    return EncodedDocument(tokens.astype(np.int32), np.array(document.supervised, dtype=np.bool_))


def _render(tokenizer: Tokenizer, messages: Sequence[Message], add_generation_prompt: bool) -> str:
    if tokenizer.chat_template is None:  # no row can mend that
        tokenizer.render_chat(messages, add_generation_prompt)
    try:
        return tokenizer.render_chat(messages, add_generation_prompt)
    except InputError as error:
        raise BadRowError(str(error)) from error


def _encode_chat(document: Document, messages: Sequence[Message], tokenizer: Tokenizer) -> EncodedDocument:
    text, spans = assistant_spans(tokenizer, messages, document.where)
    tokens, token_spans = tokenizer.encode_with_spans(text)
    return EncodedDocument(tokens, spans_mask(token_spans, spans))


def _encode_completion(prompt: str, completion: str, tokenizer: Tokenizer) -> EncodedDocument:
    tokens, token_spans = tokenizer.encode_with_spans(prompt + completion)
    mask = spans_mask(token_spans, [(len(prompt), len(prompt) + len(completion))])
    if not mask.any():
        raise BadRowError(NO_SUPERVISED)
    return _enclosed(tokens, mask, tokenizer)


def _enclosed(tokens: Int32Array, supervised: BoolArray, tokenizer: Tokenizer) -> EncodedDocument:
    """Put the start token before, unsupervised, and the end token after, supervised; nothing around nothing."""
    if not len(tokens):
        return EncodedDocument(tokens, supervised)
    if tokenizer.bos_id is not None and tokens[0] != tokenizer.bos_id:
        tokens = np.concatenate(([tokenizer.bos_id], tokens)).astype(np.int32)
        supervised = np.concatenate(([False], supervised))
    if tokenizer.eos_id is not None and tokens[-1] != tokenizer.eos_id:
        tokens = np.concatenate((tokens, [tokenizer.eos_id])).astype(np.int32)
        supervised = np.concatenate((supervised, [True]))
    return EncodedDocument(tokens, supervised)
