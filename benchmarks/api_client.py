"""The whole client (ledger, retries, limits, answers on disk) against a bare asyncio + httpx2 loop on the same server.

The server answers at once from a process of its own. Loops take turns, three rounds each; the ratio is of the medians.
Then the client's peak memory with 10,000 and with 100,000 prompts queued, each in a process of its own.

    python benchmarks/api_client.py > benchmarks/results/api_client.jsonl
"""

import argparse
import asyncio
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import httpx2  # noqa: E402

from storage.object_store import Store  # noqa: E402
from workers.api.answers import AnswerStore, request_key  # noqa: E402
from workers.api.client import ApiClient  # noqa: E402
from workers.api.config import ApiConfig, PricesConfig  # noqa: E402
from workers.api.generation import ask_all  # noqa: E402
from workers.api.reply import Request  # noqa: E402
from workers.ledger.amounts import NO_CAPS, Caps  # noqa: E402
from workers.ledger.client import LedgerClient  # noqa: E402
from workers.ledger.ledger import Budget, Ledger  # noqa: E402

TEXT = "The answer follows from the two statements above, one after the other. " * 4
REPLY = {
    "id": "x",
    "object": "chat.completion",
    "model": "teacher",
    "choices": [{"index": 0, "message": {"role": "assistant", "content": TEXT}, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 30, "completion_tokens": 60, "total_tokens": 90},
}


def body(number: int) -> dict[str, Any]:
    """Return the request body of prompt `number`."""
    words = f"Prompt number {number}: " + "consider the following statement and say what follows from it. " * 4
    return {"model": "teacher", "messages": [{"role": "user", "content": words}], "max_tokens": 128, "temperature": 0.6}


def requests(count: int) -> Iterator[tuple[bytes, Request]]:
    """Yield keyed requests, made when they are asked for."""
    for number in range(count):
        request = Request("/chat/completions", body(number), 100, 128)
        yield request_key(request, "bench"), request


class FastServer(asyncio.Protocol):
    """Answers every POST with the same bytes."""

    DATA = json.dumps(REPLY).encode()
    HEAD = f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(DATA)}\r\n\r\n".encode()

    def connection_made(self, transport: Any) -> None:
        """Keep the connection."""
        self._transport, self._buffer = transport, b""

    def data_received(self, data: bytes) -> None:
        """Answer each whole request in the buffer."""
        self._buffer += data
        while (end := self._buffer.find(b"\r\n\r\n")) >= 0:
            head = self._buffer[:end].lower()
            start = head.find(b"content-length:")
            length = int(head[start + 15 :].split(b"\r\n", 1)[0]) if start >= 0 else 0
            if len(self._buffer) < end + 4 + length:
                return
            self._buffer = self._buffer[end + 4 + length :]
            self._transport.write(self.HEAD + self.DATA)


async def serve() -> None:
    """Print the port and serve until stdin closes."""
    server = await asyncio.get_running_loop().create_server(FastServer, "127.0.0.1", 0, backlog=1024)
    print(server.sockets[0].getsockname()[1], flush=True)
    await asyncio.to_thread(sys.stdin.read)


async def bare(url: str, count: int, concurrency: int) -> float:
    """The loop that anybody would write: no retries, no ledger, nothing kept. Returns requests per second."""
    limits = httpx2.Limits(max_connections=concurrency, max_keepalive_connections=concurrency)
    numbers = iter(range(count))
    async with httpx2.AsyncClient(limits=limits, timeout=None, headers={"Authorization": "Bearer x"}) as client:

        async def work() -> None:
            for number in numbers:
                response = await client.post(f"{url}/chat/completions", json=body(number))
                response.raise_for_status()
                assert response.json()["choices"][0]["message"]["content"]

        start = time.perf_counter()
        await asyncio.gather(*(work() for _ in range(concurrency)))
        return count / (time.perf_counter() - start)


async def ours(url: str, count: int, concurrency: int, folder: str) -> float:
    """The client as `lectern generate` runs it. Returns requests per second."""
    api = ApiConfig(
        base_url=url, model="teacher", key_env=None, prices=PricesConfig(input=1, output=2), concurrency=concurrency
    )
    ledger = Ledger(Store(folder), Budget("bench", "USD", Caps.of(1e6, None, None), NO_CAPS))
    client = ApiClient(api, LedgerClient.of(ledger))
    answers = AnswerStore(Store(folder))
    start = time.perf_counter()
    result = await ask_all(requests(count), client, answers)
    await client.close()
    seconds = time.perf_counter() - start
    assert result.answered == count, result
    return count / seconds


def peak_mb(url: str, count: int, concurrency: int) -> float:
    """Return the peak memory of a process that asks `count` prompts, in MB."""
    command = [sys.executable, __file__, "--queue", str(count), "--url", url, "--concurrency", str(concurrency)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return float(done.stdout)


def main() -> None:
    """Print one JSON line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--requests", type=int, default=3000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--concurrency", type=int, default=128)
    parser.add_argument("--queued", type=int, default=100_000)
    parser.add_argument("--serve", action="store_true")
    parser.add_argument("--queue", type=int)
    parser.add_argument("--url")
    options = parser.parse_args()
    if options.serve:
        asyncio.run(serve())
        os._exit(0)
    if options.queue:
        with tempfile.TemporaryDirectory() as folder:
            asyncio.run(ours(options.url, options.queue, options.concurrency, folder))
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
        return
    command = [sys.executable, __file__, "--serve"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None and server.stdin is not None
        url = f"http://127.0.0.1:{int(server.stdout.readline())}/v1"
        print(json.dumps(measure(url, options)), flush=True)
        server.stdin.close()


def measure(url: str, options: Any) -> dict[str, Any]:
    """Return the figures."""
    rates: dict[str, list[float]] = {"bare": [], "ours": []}
    for _ in range(options.rounds):
        rates["bare"].append(asyncio.run(bare(url, options.requests, options.concurrency)))
        with tempfile.TemporaryDirectory() as folder:
            rates["ours"].append(asyncio.run(ours(url, options.requests, options.concurrency, folder)))
    result = {
        "benchmark": "api_client",
        "requests": options.requests,
        "concurrency": options.concurrency,
        "bare_per_s": round(median(rates["bare"]), 1),
        "ours_per_s": round(median(rates["ours"]), 1),
        "ratio": round(median(rates["ours"]) / median(rates["bare"]), 3),
    }
    if options.queued:
        few, many = options.queued // 10, options.queued
        result |= {f"peak_mb_{n}": round(peak_mb(url, n, options.concurrency), 1) for n in (few, many)}
    return result


if __name__ == "__main__":
    main()
