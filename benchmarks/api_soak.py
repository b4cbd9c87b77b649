"""Spends small caps against a server of which a third is faulty, while processes are killed; never more than the cap?

Each trial starts a server that bills at its own prices, and one or two runs that share a budget smaller than their
work. Every run is killed with SIGKILL at random moments and started again, until its cap stops it. Then the server's
count of what it billed is held against the cap, and its count of whole answers against those on disk.

`python benchmarks/api_soak.py --trials 50 > benchmarks/results/api_soak.jsonl`: one line a trial, the last is the sum.
"""

import argparse
import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from storage.object_store import Store  # noqa: E402
from tests.workers.api.endpoint import endpoint  # noqa: E402
from workers.api.answers import AnswerStore, request_key  # noqa: E402
from workers.api.client import ApiClient  # noqa: E402
from workers.api.config import ApiConfig, PricesConfig  # noqa: E402
from workers.api.generation import ask_all, run_asking  # noqa: E402
from workers.api.prices import Prices  # noqa: E402
from workers.api.reply import Request  # noqa: E402
from workers.ledger.amounts import NO_CAPS, PICO, Caps  # noqa: E402
from workers.ledger.client import LedgerClient  # noqa: E402
from workers.ledger.journal import Journal  # noqa: E402
from workers.ledger.ledger import Budget, Ledger  # noqa: E402

FAULTS = {
    "429": 0.04, "429-after": 0.005, "429-date": 0.005, "500": 0.03, "503": 0.03, "hang": 0.01, "drip": 0.01,
    "cut": 0.04, "truncated": 0.03, "no-usage": 0.03, "low-usage": 0.03, "high-usage": 0.02, "text-usage": 0.01,
    "empty": 0.03, "null": 0.03,
}  # fmt: skip
UNKNOWN = {"500", "503", "hang", "drip", "cut", "truncated", "no-usage", "low-usage", "high-usage", "text-usage"}
MAX_TOKENS = 24
PROMPT_WORDS = 40
KEY_VARIABLE = "LECTERN_SOAK_KEY"
ENDED, CAPPED = 0, 3


def requests(first: int, count: int) -> Iterator[tuple[bytes, Request]]:
    """Yield prompts of 40 words whose bounds are exact for a server that counts words."""
    for number in range(first, first + count):
        words = " ".join(f"p{number}w{n}" for n in range(PROMPT_WORDS))
        body = {"model": "teacher", "messages": [{"role": "user", "content": words}], "max_tokens": MAX_TOKENS}
        request = Request("/chat/completions", body, PROMPT_WORDS, MAX_TOKENS, PROMPT_WORDS)
        yield request_key(request, "soak"), request


def drive(folder: str, run: str, url: str, caps: tuple[Caps, Caps], work: tuple[int, int], concurrency: int) -> None:
    """One run, from start to its cap or its end; exits 3 where a cap stopped it."""
    api = ApiConfig(
        base_url=url, model="teacher", key_env=KEY_VARIABLE, prices=PRICES, concurrency=concurrency,
        attempt_timeout_s=8.0, max_attempts=12, max_wait_s=0.2,
    )  # fmt: skip

    async def ask() -> Any:
        ledger = LedgerClient.of(Ledger(Store(folder), Budget(run, "USD", *caps)))
        client = ApiClient(api, ledger, count_tokens=lambda text: len(text.split()))
        try:
            return await ask_all(requests(*work), client, AnswerStore(Store(folder)))
        finally:
            await client.close()

    result = run_asking(ask)
    os._exit(CAPPED if result.stopped is not None else ENDED)


PRICES = PricesConfig(input=1.0, output=2.0)


def trial(number: int, source: random.Random) -> dict[str, Any]:
    """Run one trial and return what both sides counted."""
    drivers = 2 if number % 4 == 3 else 1
    worst = Prices(PRICES).worst(PROMPT_WORDS, MAX_TOKENS)
    concurrency = source.choice([16, 64, 256, 256])
    kills = source.randint(1, 3)
    # Each kill may cost all that is in flight: what is left must still be work.
    reserved = source.randint(150, 350) + drivers * kills * concurrency
    cap = Caps(money=reserved * worst.money)
    caps = (NO_CAPS, cap) if drivers == 2 else (cap, NO_CAPS)
    began = time.monotonic()
    with (
        tempfile.TemporaryDirectory() as folder,
        endpoint(
            faults=FAULTS, seed=number, hang_s=10.0, key="soak", delay_s=source.choice([0.0, 0.02, 0.1])
        ) as server,
    ):
        left = dict.fromkeys(range(drivers), kills)
        running: dict[int, Any] = {}
        killed = 0
        while left or running:
            for driver in [d for d in left if d not in running]:
                # Each asks for more than the whole budget buys.
                arguments = (folder, f"run{driver}", server.url, caps, (driver * 10_000, 3 * reserved), concurrency)
                process = multiprocessing.get_context("fork").Process(target=drive, args=arguments)
                process.start()
                running[driver] = (process, segments(folder) + source.randint(1, 10))
            time.sleep(0.02)
            for driver, (process, target) in list(running.items()):
                if not process.is_alive():
                    if process.exitcode not in (ENDED, CAPPED):
                        raise SystemExit(f"trial {number}: a run ended with exit code {process.exitcode}")
                    del running[driver]
                    left.pop(driver)
                elif left[driver] and segments(folder) >= target:
                    os.kill(process.pid, signal.SIGKILL)
                    process.join()
                    killed += 1
                    left[driver] -= 1
                    del running[driver]
        stats = server.stats()
        facts = compare(folder, stats, cap)
    return {
        "trial": number, "runs": drivers, "concurrency": concurrency, "killed": killed,
        "seconds": round(time.monotonic() - began, 1), "most_in_flight": stats["most_in_flight"], **facts,
    }  # fmt: skip


def segments(folder: str) -> int:
    """Return how many objects hold answers: kills come while answers do."""
    path = Path(folder) / "answers"
    return len(list(path.glob("*.gz"))) if path.is_dir() else 0


def compare(folder: str, stats: Any, cap: Caps) -> dict[str, Any]:
    """Hold the server's counts against the journal and the answers on disk."""
    account = Journal(Store(folder), "USD").account
    totals = account.totals()
    answers = AnswerStore(Store(folder))
    assert cap.money is not None
    billed = round(stats["billed"]["money"] * PICO)
    faults = {name: count for name, count in stats["faults"].items() if name}
    requests_seen = sum(stats["faults"].values())
    good, again = len(stats["good"]), sum(count - 1 for count in stats["good"].values())
    # The server knows contents by their bytes, the store by their key: both are counted.
    sound = sum(1 for key in answers._where if (found := answers.get(key)) is not None and found.reply is not None)
    # An unknown outcome that is none of the server's doing: a whole answer that came too late on a busy machine.
    unknown = sum(count for name, count in faults.items() if name in UNKNOWN)
    late = max(0, len(account.kept) - unknown)
    usable = good + sum(count for name, count in faults.items() if name.endswith("usage"))
    return {
        "requests": requests_seen,
        "faulty": round(sum(faults.values()) / max(requests_seen, 1), 3),
        "cap": cap.money / PICO,
        "billed_share": round(billed / cap.money, 4),
        "used_share": round(totals.used.money / cap.money, 4),
        "within_cap": billed <= cap.money and totals.used.money <= cap.money,
        "in_flight_at_kills": len(account.open),
        "late": late,
        "answers_on_disk": sound,
        "lost_or_asked_again": max(0, usable - sound) + again,
        "beyond_in_flight": max(0, max(0, usable - sound) + again - len(account.open) - late),
    }


def main() -> None:
    """Run the trials."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--trials", type=int, default=50)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no trial after this time")
    options = parser.parse_args()
    os.environ[KEY_VARIABLE] = "soak"
    rows = []
    began = time.monotonic()
    for number in range(options.first, options.first + options.trials):
        if time.monotonic() - began > options.seconds:
            break
        rows.append(trial(number, random.Random(number)))
        print(json.dumps(rows[-1]), flush=True)
    print(json.dumps(summary(rows)))


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the sum over trials."""
    return {
        "benchmark": "api_soak",
        "trials": len(rows),
        "requests": sum(row["requests"] for row in rows),
        "killed": sum(row["killed"] for row in rows),
        "above_cap": sum(not row["within_cap"] for row in rows),
        "least_used_share": min(row["used_share"] for row in rows),
        "mean_billed_share": round(sum(row["billed_share"] for row in rows) / len(rows), 4),
        "answers_on_disk": sum(row["answers_on_disk"] for row in rows),
        "in_flight_at_kills": sum(row["in_flight_at_kills"] for row in rows),
        "late": sum(row["late"] for row in rows),
        "beyond_in_flight": sum(row["beyond_in_flight"] for row in rows),
        "most_in_flight": max(row["most_in_flight"] for row in rows),
    }


if __name__ == "__main__":
    main()
