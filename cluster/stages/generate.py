"""The teacher writes completions for prompts: asked, filtered, kept as Parquet."""

import time
from typing import Any

from cluster.budget import check_api, standing_text, token_counter
from cluster.config import RunConfig
from cluster.progress import Progress, Shown
from cluster.rundir import RunDir
from cluster.stages.ledger import budget_of, ledger_store
from storage.errors import InputError, WorkerError
from storage.object_store import Store
from storage.tokenizer import Tokenizer
from workers.api.answers import AnswerStore
from workers.api.batch import BatchAsker
from workers.api.batch_calls import BatchCalls
from workers.api.client import ApiClient
from workers.api.completions import write_completions
from workers.api.filters import make_checker
from workers.api.generation import AskResult, Author, ask_all, keyed_requests, run_asking
from workers.api.key import read_key
from workers.api.prices import Prices
from workers.api.prompts import read_prompts
from workers.ledger.client import LedgerClient
from workers.ledger.ledger import Ledger, describe
from workers.model_folder import resolve_model

NOTE_EVERY_S = 0.5


def generate(config: RunConfig, run: RunDir, progress: Progress) -> dict[str, Any]:
    """Ask for every completion that is not on disk, then write all that are.

    Returns the summary of `write_completions` with `{url, answered, reused, cost}`.

    Raises:
        InputError: endpoint, key, prices, prompts or a filter are wrong; nothing was spent.
        BudgetError: a cap ended the asking; what was paid for is written.
        WorkerError: some requests got no answer; all others are written, and a later run asks only those.
    """
    if config.teacher.kind == "local":
        from cluster.stages.generate_local import generate_local

        return generate_local(config, run, progress)
    if config.teacher.kind == "mixed":
        raise InputError("`lectern generate` asks one teacher: set teacher.kind to local or api")
    own, api = config.generate, config.teacher.api
    check_api(config)
    if own.url is None:
        raise InputError("generate.url is not set; name the folder or URL that the completions go to")
    tokenizer = _tokenizer(config) if own.logprobs is not None else None
    read_key(api)
    make_checker(own.filters.checker)
    count, author = token_counter(config), Author.of_api(api)
    total = own.samples * sum(1 for _ in read_prompts(own))
    out, paid = Store(own.url), Store(config.cache.url)
    out.probe()
    answers = AnswerStore(paid)
    ledger = Ledger(ledger_store(config), budget_of(config, run))
    began = time.monotonic()
    run.event("stage_started", stage="generate")
    with progress.task("Generating", "completions") as task:
        keyed = keyed_requests(read_prompts(own), own, author, count)
        noted = _Noted(task, ledger, total)

        async def work() -> tuple[AskResult, dict[str, int]]:
            client = ApiClient(api, LedgerClient.of(ledger), count_tokens=count)
            try:
                if api.batch is None:
                    found = await ask_all(keyed, client, answers, noted.on_progress)
                else:
                    prices = Prices(api.prices, api.batch.price)
                    asker = BatchAsker(BatchCalls(client), ledger, answers, paid, prices, count)
                    found = await asker.ask_all(keyed, noted.on_batches)
            finally:
                await client.close()
            return found, client.counters.retried

        asked, retried = run_asking(work)
        noted.on_progress(asked, last=True)
    summary = write_completions(out, read_prompts(own), own, author, answers, count, tokenizer)
    cost = describe(ledger.standing())
    facts = {**summary, "answered": asked.answered, "reused": asked.reused, "retried": retried, "cost": cost}
    run.event("stage_finished", stage="generate", seconds=round(time.monotonic() - began, 3), skipped=False, **facts)
    run.finish("generate", "", {**facts, "url": out.shown()})
    if asked.stopped is not None:
        raise asked.stopped
    if asked.failed:
        reason, number = max(asked.failed.items(), key=lambda item: item[1])
        raise WorkerError(
            f"{sum(asked.failed.values())} requests got no answer, {number} of them because of {reason}; all others "
            "are written, and the same command asks only these again"
        )
    return {**facts, "url": out.shown()}


def _tokenizer(config: RunConfig) -> Tokenizer:
    """Return the teacher's tokenizer, whose ids the endpoint's tokens are."""
    if config.teacher.name == "embedded":
        raise InputError(
            "generate.logprobs needs the teacher's tokenizer; name the folder or hub name of the model behind the "
            "endpoint in teacher.name"
        )
    folder = resolve_model(config.teacher.name, config.teacher.revision, weights=False)
    return Tokenizer.load(folder, config.data.chat_template)


class _Noted:
    """Shows how far the asking is and what it costs, not more often than anybody can read."""

    def __init__(self, task: Shown, ledger: Ledger, total: int) -> None:
        self._task, self._ledger, self._total = task, ledger, total
        self._at = 0.0

    def on_batches(self, result: AskResult, done: int) -> None:
        """Take the counts so far, and how many requests of open batches the endpoint is through with."""
        asked = result.answered + result.reused + result.set_aside
        standing = standing_text(self._ledger.standing(), result.answered)
        self._task.update(asked, self._total, f"{done} more done in batches, {standing}")

    def on_progress(self, result: AskResult, last: bool = False) -> None:
        """Take the counts so far."""
        now = time.monotonic()
        if now - self._at < NOTE_EVERY_S and not last:
            return
        self._at = now
        done = result.answered + result.reused + result.set_aside
        self._task.update(done, self._total, standing_text(self._ledger.standing(), result.answered))
