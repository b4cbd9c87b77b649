"""Answers that come piece by piece, put together to what the same answer would be in one piece."""

from typing import Any

import openai

from workers.api.reply import BrokenReplyError


async def collect_stream(client: openai.AsyncOpenAI, path: str, body: dict[str, Any]) -> dict[str, Any]:
    """Ask for a stream, with usage at its end, and return the whole answer.

    Raises BrokenReplyError when the stream ends before its last piece.
    """
    asked = {**body, "stream": True, "stream_options": {"include_usage": True}}
    stream = await client.post(path, cast_to=object, body=asked, stream=True, stream_cls=openai.AsyncStream[object])
    text: list[str] = []
    reasoning: list[str] = []
    finish_reason: str | None = None
    usage: Any = None
    async with stream:
        async for piece in stream:
            if not isinstance(piece, dict):
                continue
            usage = piece.get("usage") or usage
            choice = next(iter(piece.get("choices") or []), None)
            if choice is None:
                continue
            delta = choice.get("delta") or {}
            text.append(delta.get("content") or choice.get("text") or "")
            reasoning.append(delta.get("reasoning_content") or delta.get("reasoning") or "")
            finish_reason = choice.get("finish_reason") or finish_reason
    if finish_reason is None:
        raise BrokenReplyError("the stream ended before the answer did")
    message = {"content": "".join(text), "reasoning_content": "".join(reasoning) or None}
    return {"choices": [{"message": message, "finish_reason": finish_reason}], "usage": usage}
