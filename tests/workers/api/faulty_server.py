"""An OpenAI-compatible server that misbehaves on purpose, bills at its own prices, and records what it billed.

A process of its own over real HTTP: `python faulty_server.py '{"faults": {"429": 0.1, …}, …}'` prints its port and
serves until its stdin closes or an hour has passed. `GET /stats` tells what was billed and how often each content was
asked; `POST /control` changes settings. Settings are the fields of `Settings`.
"""

import asyncio
import collections
import email.utils
import hashlib
import itertools
import json
import logging
import math
import random
import sys
import time
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web
from batch_server import Batches

RETRY = ("429", "429-after", "429-date")
PAID_AND_BROKEN = (
    "500", "503", "hang", "drip", "cut", "truncated", "no-usage", "low-usage", "high-usage", "text-usage", "empty",
    "null", "counts",
)  # fmt: skip
"""Faults that are billed, or may be, with an answer of no or little use; 500 and 503 are billed every other time."""


@dataclass
class Settings:
    model: str = "teacher"
    key: str = "sk-right"
    faults: dict[str, float] = field(default_factory=dict)
    """Name of a fault → share of the requests."""
    seed: int = 0
    input_price: float = 1.0
    """Per million tokens, like `output_price`."""
    output_price: float = 2.0
    balance: float | None = None
    """402 once this much was billed."""
    context: int = 4096
    vocab: list[str] | None = None
    """Token strings by id; none counts words and knows no ids."""
    prompt_logprobs: int = 20
    """Most that prompt scoring gives; 0 refuses it."""
    echo: bool = True
    top_logprobs: int = 20
    token_ids: bool = True
    """Takes ids as prompts and gives them back where asked."""
    reasoning: bool = False
    delay_s: float = 0.0
    hang_s: float = 20.0
    refuse: str = ""
    """Prompts with this text in them are refused by the content filter."""
    context_error: bool = True
    id_shift: int = 0
    """Another tokenizer: ids come back shifted."""
    batch_polls: int = 1
    """A batch is executed once it was looked at so often."""
    batch_price: float = 0.5
    batch_fault: str = ""
    """`lost` or `unheard` (once): the answer to its creation is an error, before or after it was made; `failed`,
    `expired` after half of the requests, `no-usage`."""


class Server:
    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.random = random.Random(settings.seed)
        self.billed = {"money": 0.0, "input": 0, "output": 0, "requests": 0}
        self.asked: collections.Counter[str] = collections.Counter()
        self.good: collections.Counter[str] = collections.Counter()
        self.faults: collections.Counter[str] = collections.Counter()
        self.in_flight = self.most_in_flight = 0

    def fault(self) -> str:
        point = self.random.random()
        for name, share in self.settings.faults.items():
            point -= share
            if point < 0:
                return name
        return ""

    def bill(self, input_: int, output: int, share: float = 1.0) -> None:
        own = self.settings
        self.billed["money"] += share * (input_ * own.input_price + output * own.output_price) / 1e6
        self.billed["input"] += input_
        self.billed["output"] += output
        self.billed["requests"] += 1

    async def complete(self, request: web.Request) -> web.StreamResponse:
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            return await self._complete(request)
        finally:
            self.in_flight -= 1

    async def _complete(self, request: web.Request) -> web.StreamResponse:
        own = self.settings
        raw = await request.read()
        body = json.loads(raw)
        if (error := self._refusal(request, body)) is not None:
            return error
        content = hashlib.blake2b(raw, digest_size=12).hexdigest()
        self.asked[content] += 1
        if own.delay_s:
            await asyncio.sleep(own.delay_s)
        fault = self.fault()
        self.faults[fault] += 1
        if fault in RETRY:
            headers = {}
            if fault == "429-after":
                headers["Retry-After"] = "1"
            if fault == "429-date":
                headers["Retry-After"] = email.utils.formatdate(time.time() + 1, usegmt=True)
            return _error(429, "slow down", "rate_limit_exceeded", headers)
        reply = self._reply(request.path.endswith("/chat/completions"), body)
        usage = reply["usage"]
        if fault in ("500", "503"):
            if self.random.random() < 0.5:
                self.bill(usage["prompt_tokens"], usage["completion_tokens"])
            return _error(int(fault), "internal trouble", "server_error")
        if fault == "empty":
            usage["completion_tokens"], reply["choices"] = 0, []
        self.bill(usage["prompt_tokens"], usage["completion_tokens"])
        _spoil(fault, reply)
        if fault == "hang":
            await asyncio.sleep(own.hang_s)
            return web.Response(status=504)
        data = json.dumps(reply).encode()
        if fault in ("drip", "cut", "truncated"):
            return await self._slowly(request, fault, data)
        if not fault:
            self.good[content] += 1
        if body.get("stream"):
            return await self._stream(request, reply)
        return web.Response(body=data, content_type="application/json")

    async def _slowly(self, request: web.Request, fault: str, data: bytes) -> web.StreamResponse:
        if fault == "truncated":
            return web.Response(body=data[: len(data) // 2], content_type="application/json")
        response = web.StreamResponse(headers={"Content-Type": "application/json", "Content-Length": str(len(data))})
        await response.prepare(request)
        for start in range(0, len(data), 8):
            await response.write(data[start : start + 8])
            if fault == "cut" and start > len(data) // 2:
                assert request.transport is not None
                request.transport.abort()
                return response
            if fault == "drip":
                await asyncio.sleep(self.settings.hang_s / (len(data) / 8))
        return response

    async def _stream(self, request: web.Request, reply: dict[str, Any]) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        choice = reply["choices"][0]
        message = choice.get("message") or {"content": choice.get("text")}
        pieces: list[dict[str, Any]] = []
        for name in ("reasoning_content", "content"):
            pieces += [{name: word + " "} for word in (message.get(name) or "").split()]
        for piece in pieces:
            part = {"choices": [{"index": 0, "delta": piece, "finish_reason": None}]}
            await response.write(f"data: {json.dumps(part)}\n\n".encode())
        last = {"choices": [{"index": 0, "delta": {}, "finish_reason": choice["finish_reason"]}]}
        await response.write(f"data: {json.dumps(last)}\n\n".encode())
        await response.write(
            f"data: {json.dumps({'choices': [], 'usage': reply['usage']})}\n\ndata: [DONE]\n\n".encode()
        )
        return response

    def _refusal(self, request: web.Request, body: dict[str, Any]) -> web.Response | None:
        own = self.settings
        if request.headers.get("Authorization") != f"Bearer {own.key}":
            sent = request.headers.get("Authorization", "")
            return _error(401, f"Incorrect API key provided: {sent}", "invalid_api_key")
        if own.balance is not None and self.billed["money"] >= own.balance:
            return _error(402, "Insufficient Balance", "insufficient_balance")
        return self._unfit(body)

    def refusal_of(self, body: dict[str, Any]) -> tuple[int, Any] | None:
        """Return status and error of a request of a batch that is refused."""
        found = self._unfit(body)
        return None if found is None else (found.status, json.loads(found.text or "{}"))

    def _unfit(self, body: dict[str, Any]) -> web.Response | None:
        own = self.settings
        if body.get("model") != own.model:
            return _error(404, f"The model `{body.get('model')}` does not exist", "model_not_found")
        if own.refuse and own.refuse in json.dumps(body):
            return _error(400, "The prompt was flagged by the content filter", "content_filter")
        prompt = body.get("prompt")
        if isinstance(prompt, list) and not own.token_ids:
            return _error(400, "prompt must be a string", "invalid_request_error")
        if body.get("prompt_logprobs") and body["prompt_logprobs"] > own.prompt_logprobs:
            return _error(400, f"prompt_logprobs must be at most {own.prompt_logprobs}", "invalid_request_error")
        if body.get("echo") and not own.echo:
            return _error(400, "echo is not supported", "invalid_request_error")
        wanted = body.get("top_logprobs") or (body.get("logprobs") if not isinstance(body.get("logprobs"), bool) else 0)
        if wanted and wanted > own.top_logprobs:
            return _error(400, f"top_logprobs must be at most {own.top_logprobs}", "invalid_request_error")
        if own.context_error and len(self._prompt_ids(body)) + _limit(body) > own.context:
            return _error(400, f"maximum context length is {own.context} tokens", "context_length_exceeded")
        return None

    def _prompt_ids(self, body: dict[str, Any]) -> list[int]:
        prompt = body.get("prompt")
        if isinstance(prompt, list):
            return prompt
        text = prompt if prompt is not None else " ".join(str(m["content"]) for m in body.get("messages", []))
        words = text.split()
        return [int(hashlib.blake2b(word.encode(), digest_size=4).hexdigest(), 16) % 1000 for word in words]

    def _top(self, before: int, k: int) -> list[tuple[int, float]]:
        """The k likeliest ids after one: chances 1/2, 1/4, … in an order that depends on the id."""
        size = len(self.settings.vocab or range(1000))
        return [((before * 7 + j * 13 + 1) % size, math.log(0.5 ** (j + 1))) for j in range(k)]

    def _token(self, token: int, as_ids: bool) -> str:
        shifted = token + self.settings.id_shift
        if as_ids and self.settings.token_ids:
            return f"token_id:{shifted}"
        vocab = self.settings.vocab
        return vocab[shifted % len(vocab)] if vocab else f"w{shifted}"

    def _reply(self, chat: bool, body: dict[str, Any]) -> dict[str, Any]:
        prompt = self._prompt_ids(body)
        limit = _limit(body)
        seed = int(hashlib.blake2b(json.dumps(body, sort_keys=True).encode(), digest_size=4).hexdigest(), 16)
        source = random.Random(seed)
        num_output = source.randint(1, limit) if limit > 1 else limit
        ids = [prompt[-1] if prompt else 0]
        for _ in range(num_output):
            ids.append(self._top(ids[-1], 4)[source.randrange(4)][0])
        output = ids[1:]
        vocab = self.settings.vocab
        text = "".join(vocab[i] for i in output) if vocab else " ".join(f"w{i}" for i in output)
        thinking = len(output) // 2 if self.settings.reasoning and chat else 0
        usage: dict[str, Any] = {"prompt_tokens": len(prompt), "completion_tokens": num_output}
        usage["total_tokens"] = len(prompt) + num_output
        choice: dict[str, Any] = {"index": 0, "finish_reason": "length" if num_output == limit else "stop"}
        if chat:
            words = text.split(" ")
            choice["message"] = {"role": "assistant", "content": " ".join(words[thinking:])}
            if thinking:
                choice["message"]["reasoning_content"] = " ".join(words[:thinking])
                usage["completion_tokens_details"] = {"reasoning_tokens": thinking}
            if body.get("logprobs"):
                choice["logprobs"] = {"content": self._chat_logprobs(ids, body)}
        else:
            choice["text"] = text
            self._completion_logprobs(choice, prompt, ids, body)
        return {"id": "x", "object": "x", "model": self.settings.model, "choices": [choice], "usage": usage}

    def _chat_logprobs(self, ids: list[int], body: dict[str, Any]) -> list[dict[str, Any]]:
        found = []
        as_ids = bool(body.get("return_tokens_as_token_ids"))
        for before, token in itertools.pairwise(ids):
            top = self._top(before, body.get("top_logprobs") or 0)
            found.append(
                {
                    "token": self._token(token, as_ids),
                    "logprob": dict(self._top(before, 4))[token],
                    "top_logprobs": [{"token": self._token(t, as_ids), "logprob": p} for t, p in top],
                }
            )
        return found

    def _scored(self, ids: list[int], k: int, as_ids: bool) -> list[tuple[int, float, list[tuple[int, float]]]]:
        """For each id but the first: itself, its log-probability, the k likeliest."""
        rows = []
        for before, token in itertools.pairwise(ids):
            full = dict(self._top(before, 20))
            rows.append((token, full.get(token, math.log(1e-9)), self._top(before, k)))
        return rows

    def _completion_logprobs(
        self, choice: dict[str, Any], prompt: list[int], ids: list[int], body: dict[str, Any]
    ) -> None:
        as_ids = bool(body.get("return_tokens_as_token_ids"))
        k = body.get("prompt_logprobs")
        if k and self.settings.prompt_logprobs:
            rows: list[Any] = [None]
            for token, own, top in self._scored(prompt, k, as_ids):
                entry = {str(t + self.settings.id_shift): {"logprob": p, "rank": n + 1} for n, (t, p) in enumerate(top)}
                entry.setdefault(str(token + self.settings.id_shift), {"logprob": own, "rank": 99})
                rows.append(entry)
            choice["prompt_logprobs"] = rows
        if body.get("logprobs") is not None:
            whole = [*prompt, *ids[1:]] if body.get("echo") else ids
            scored = self._scored(whole, int(body["logprobs"]), as_ids)
            tokens = [self._token(t, as_ids) for t, _, _ in scored]
            values: list[Any] = [own for _, own, _ in scored]
            tops: list[Any] = [{self._token(t, as_ids): p for t, p in top} for _, _, top in scored]
            if body.get("echo"):
                first = self._token(whole[0], as_ids)
                tokens, values, tops = [first, *tokens], [None, *values], [None, *tops]
            choice["logprobs"] = {"tokens": tokens, "token_logprobs": values, "top_logprobs": tops}

    async def models(self, request: web.Request) -> web.Response:
        if request.headers.get("Authorization") != f"Bearer {self.settings.key}":
            return _error(401, "Incorrect API key provided", "invalid_api_key")
        names = [self.settings.model, "another-model"]
        data = [{"id": name, "object": "model", "max_model_len": self.settings.context} for name in names]
        return web.json_response({"object": "list", "data": data})

    async def stats(self, _: web.Request) -> web.Response:
        facts = {"billed": self.billed, "asked": self.asked, "good": self.good, "faults": self.faults}
        most, self.most_in_flight = self.most_in_flight, self.in_flight
        return web.json_response({**facts, "most_in_flight": most})

    async def control(self, request: web.Request) -> web.Response:
        for name, value in (await request.json()).items():
            setattr(self.settings, name, value)
        return web.json_response({})


def _limit(body: dict[str, Any]) -> int:
    limit = body.get("max_completion_tokens", body.get("max_tokens"))
    return 16 if limit is None else int(limit)


def _error(status: int, message: str, code: str, headers: dict[str, str] | None = None) -> web.Response:
    error = {"error": {"message": message, "type": code, "code": code}}
    return web.json_response(error, status=status, headers=headers)


def _spoil(fault: str, reply: dict[str, Any]) -> None:
    usage = reply["usage"]
    if fault == "no-usage":
        del reply["usage"]
    elif fault == "low-usage":
        usage["prompt_tokens"], usage["completion_tokens"] = usage["prompt_tokens"] // 3, 0
    elif fault == "high-usage":
        usage["completion_tokens"] *= 1000
    elif fault == "text-usage":
        usage["prompt_tokens"], usage["completion_tokens"] = "many", -5
    elif fault == "null":
        for choice in reply["choices"]:
            choice["logprobs"] = None
            choice["prompt_logprobs"] = None
            if "message" in choice:
                choice["message"]["content"] = None
                choice["message"].pop("reasoning_content", None)
    elif fault == "counts":
        for choice in reply["choices"]:
            if choice.get("prompt_logprobs"):
                choice["prompt_logprobs"].pop()
            for name, value in (choice.get("logprobs") or {}).items():
                choice["logprobs"][name] = value[:-1]


def application(server: Server) -> web.Application:
    app = web.Application(client_max_size=64 << 20)
    Batches(server).add_routes(app)
    app.router.add_post("/v1/chat/completions", server.complete)
    app.router.add_post("/v1/completions", server.complete)
    app.router.add_get("/v1/models", server.models)
    app.router.add_get("/stats", server.stats)
    app.router.add_post("/control", server.control)
    return app


async def serve(settings: Settings) -> None:
    runner = web.AppRunner(application(Server(settings)), access_log=None, shutdown_timeout=0.2)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0, backlog=1024)
    await site.start()
    assert runner.addresses
    print(runner.addresses[0][1], flush=True)
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    await asyncio.wait([asyncio.ensure_future(reader.read())], timeout=3600)
    await runner.cleanup()


if __name__ == "__main__":
    # Clients hang up on it all the time.
    logging.disable(logging.CRITICAL)
    asyncio.run(serve(Settings(**json.loads(sys.argv[1] if len(sys.argv) > 1 else "{}"))))
