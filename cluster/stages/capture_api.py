"""The capture stage where the teacher is behind an API: probe, then score through it, under the caps."""

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from cluster.budget import check_api
from cluster.progress import Shown
from cluster.stages.ledger import budget_of, ledger_store
from cluster.workspace import Workspace
from storage.errors import InputError
from storage.object_store import Store
from storage.samples import Int64Array
from workers.api.client import ApiClient
from workers.api.generation import run_asking
from workers.api.probe import Capabilities, keep_probe, kept_probe, probe, require_signal
from workers.ledger.client import LedgerClient
from workers.ledger.ledger import Ledger

OnEvent = Callable[[dict[str, Any]], None]


def score_api(work: Workspace, rows: Int64Array, task: Shown, on_event: OnEvent) -> dict[str, Any]:
    """Score what is missing through the endpoint; returns what `capture` keeps, with `stopped` where a cap ended it.

    Raises:
        InputError: the endpoint cannot do what the config asks; the message says what it can.
        BudgetError: a cap left nothing for the probe.
    """
    config = work.config
    check_api(config)
    if config.cache.kind == "text":
        from workers.api.capture import keep_text

        return _result(keep_text(config.teacher, config.cache, work.samples, rows, work.identity))
    found = probed(work, task)
    if found.scoring is None and found.top_logprobs and config.generate.logprobs is not None:
        return _result(_score_generated(work, rows, task, on_event))
    if found.scoring is None:
        raise InputError(
            f"{found.base_url}, model {found.model} scores no prompts ({'; '.join(found.steps_down)}), so it cannot "
            "say what it thinks of given text. Have it write text instead: `lectern generate`, then a source with the "
            "kept completions and cache.kind: text, or, where it gives log-probabilities of its own tokens, with "
            "generate.logprobs set, tokens_field: tokens in the source, and cache.kind: topk"
        )
    if config.teacher.kind == "mixed":
        from workers.mixed import capture_mixed

        return _result(
            capture_mixed(
                config.teacher,
                config.cache,
                work.model_folder,
                work.samples,
                rows,
                work.identity,
                found.scoring,
                ledger_store(config).url,
                budget_of(config, work.run),
                work.machines(task),
                on_event,
                ((work.run.result("capture") or {}).get("last") or {}).get("tokens_per_s"),
            )
        )
    work.ray(task)
    from workers.api.capture import capture_api

    result = capture_api(
        config.teacher,
        config.cache,
        work.samples,
        rows,
        work.identity,
        found.scoring,
        ledger_store(config).url,
        budget_of(config, work.run),
        on_event,
    )
    return _result(result)


def _score_generated(work: Workspace, rows: Int64Array, task: Shown, on_event: OnEvent) -> Any:
    from workers.api.answers import AnswerStore
    from workers.api.capture import capture_generated
    from workers.api.generated import GeneratedText, TokenNames

    config = work.config
    if config.generate.url is None:
        raise InputError("generate.url is not set; name where `lectern generate` put the completions")
    answers, names = AnswerStore(Store(config.cache.url)), TokenNames(work.tokenizer)
    text = GeneratedText(Store(config.generate.url), answers, names, config.cache.top_k)
    if not len(text):
        raise InputError(
            f"{config.generate.url} holds no completion with its tokens; run `lectern generate` with generate.logprobs"
        )
    task.say(f"  targets come from the log-probabilities of {len(text):,} completions")
    return capture_generated(config.teacher, config.cache, work.samples, rows, work.identity, text, on_event)


def probed(work: Workspace, task: Shown) -> Capabilities:
    """Return what the endpoint gives: as kept with the dataset, else by asking; InputError below `teacher.require`."""
    config, store = work.config, Store(work.config.cache.url)
    api = config.teacher.api
    found = kept_probe(store, api)
    if found is None or (found.scored_entries and found.scored_entries < config.cache.top_k):
        task.note("asking the endpoint what it gives")
        ledger = Ledger(ledger_store(config), budget_of(config, work.run))

        async def ask() -> Capabilities:
            client = ApiClient(api, LedgerClient.of(ledger))
            try:
                return await probe(client, work.tokenizer, config.cache.top_k)
            finally:
                await client.close()

        found = run_asking(ask)
        assert found is not None
        keep_probe(store, found)
        work.run.event("probed", **found.model_dump(mode="json"), signal=found.signal)
    task.say(f"  {found.base_url}, model {found.model} gives: {found.signal.replace('_', ' ')}")
    for step in found.steps_down:
        task.say(f"  {step}")
    require_signal(found, config.teacher.require)
    return found


def _result(found: Any) -> dict[str, Any]:
    last = {**asdict(found), "tokens_per_s": round(found.tokens_per_s, 4)}
    return {
        "scored_samples": found.scored_samples,
        "reused_samples": found.reused_samples,
        "last": last,
    }
