"""What a run would do and cost, before anything is spent: reads text, runs no model, imports no torch and no ray."""

import json
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any

from cluster.api_plan import api_plan
from cluster.checks import (
    check_curriculum,
    check_dataset,
    check_future_teacher,
    check_student,
    check_tasks,
    check_teacher_fits,
    source_passes,
    uses_chat_template,
)
from cluster.config import RunConfig
from cluster.estimate import bytes_per_token
from cluster.pricing import RunCost, stage_costs
from cluster.rates import Rates, measured_rates
from cluster.rundir import RunDir
from cluster.selection import capture_rows, heldout_rows
from storage.identity import DatasetIdentity
from storage.reader import Dataset
from storage.sample_set import SampleSet, prepare_samples
from storage.samples import Int64Array
from storage.tokenizer import Tokenizer
from storage.union import open_existing
from workers.api.identity import api_identity
from workers.embedded import ensure_tokenizer, find_teacher
from workers.model_folder import model_facts, resolve_model, teacher_identity
from workers.units import plan_units
from workers.work import lacking


@dataclass
class Plan:
    """The plan of one run."""

    sources: dict[str, Any]
    """`{source: {split: {samples, tokens, supervised}}}` of the whole sample set."""
    samples: int
    """Samples that the run needs targets for."""
    tokens: int
    supervised_tokens: int
    cached_samples: int
    """Of these, in the dataset already."""
    missing_samples: int
    refused_samples: int
    """Not in the dataset either: a teacher refused them before, and the run does without."""
    missing_tokens: int
    units: int
    """Work units that would be scored."""
    expected_bytes: int
    """What they would add to the dataset."""
    bytes_per_token: float
    """Assumed per supervised token; `bytes_measured` tells whether it comes from the dataset itself."""
    bytes_measured: bool
    tokens_per_s: float | None
    """Rate of the whole teacher, where one is known."""
    teacher_hours: float | None
    """Machine hours of all replicas to score what is missing."""
    cost: float | None
    currency: str
    steps: int
    train_samples: int
    """Samples that training consumes, repeats counted."""
    passes: dict[str, float]
    """How often training passes over each source."""
    money: dict[str, Any]
    """What machines, API and storage cost; see `pricing.RunCost`."""
    api: dict[str, Any] | None = None
    """What a teacher behind an API would cost; see `api_plan.api_plan`."""
    checks: list[str] = field(default_factory=list)
    """What was checked and found right."""
    unknown: list[str] = field(default_factory=list)
    """What could not be told yet, and why."""

    def to_json(self) -> dict[str, Any]:
        """Return the plan as JSON values."""
        return asdict(self)


PLAN_KEY = "plan.json"


def make_plan(config: RunConfig, run: RunDir, rates: Rates | None = None) -> Plan:
    """Prepare the samples in the run directory, where `run` finds them again, and count what is to be done.

    Args:
        config: the checked config.
        run: where samples are kept, and where rates are looked up that are not given.
        rates: what is known of teacher and training.

    Raises:
        InputError: anything that `run` would refuse before it spends something.
    """
    checks, unknown = list[str](), list[str]()
    run.probe()
    rates = measured_rates(run) if rates is None else rates
    tokenizer = _tokenizer(config, checks)
    samples = prepare_samples(config.data, tokenizer, run.path("samples"))
    check_tasks(config)
    check_curriculum(config, samples)
    checks.append("every source of the curriculum exists and has training samples")
    rows = capture_rows(samples, config.evaluate.samples_per_source)
    identity = _identity(config, tokenizer, checks, unknown)
    missing, refused, dataset = _missing(config, tokenizer, samples, rows, identity)
    fingerprint = identity.fingerprint if identity is not None else ""
    units = plan_units(missing, samples.num_tokens, samples.sample_ids, fingerprint, config.cache.unit_tokens, rows)
    measured = dataset is not None and dataset.totals().supervised > 0
    per_token = dataset.totals().bytes_per_token if dataset and measured else _assumed(config, tokenizer, samples)
    rate = rates.capture
    missing_tokens = int(samples.num_tokens[missing].sum())
    hours = missing_tokens / rate / 3600 * config.teacher.replicas.max if rate else None
    expected_bytes = round(per_token * int(samples.num_supervised[missing].sum()))
    passes = source_passes(config, samples)
    api = api_plan(config, len(missing), missing_tokens) if config.teacher.kind != "local" else None
    held = dataset.totals().bytes if dataset is not None else 0
    money = _money(config, samples, rates, missing_tokens, passes, api, held + expected_bytes)
    return Plan(
        sources=samples.summary(),
        samples=len(rows),
        tokens=int(samples.num_tokens[rows].sum()),
        supervised_tokens=int(samples.num_supervised[rows].sum()),
        cached_samples=len(rows) - len(missing) - refused,
        missing_samples=len(missing),
        refused_samples=refused,
        missing_tokens=missing_tokens,
        units=len(units),
        expected_bytes=expected_bytes,
        bytes_per_token=round(per_token, 2),
        bytes_measured=measured,
        tokens_per_s=rate,
        teacher_hours=None if hours is None else round(hours, 4),
        cost=next((stage["cost"] for stage in money["stages"] if stage["stage"] == "capture"), None),
        currency=config.budget.currency,
        steps=sum(stage.train.steps for stage in config.chain()),
        train_samples=sum(stage.train.steps * stage.train.global_batch_size for stage in config.chain()),
        passes={name: round(times, 2) for name, times in passes.items()},
        money=money,
        api=api,
        checks=checks,
        unknown=unknown,
    )


def _money(
    config: RunConfig,
    samples: SampleSet,
    rates: Rates,
    missing_tokens: int,
    passes: dict[str, float],
    api: dict[str, Any] | None,
    dataset_bytes: int,
) -> dict[str, Any]:
    """The cost of the whole run, as JSON values."""
    cluster = config.cluster
    drawn = sum(times * int(samples.num_tokens[samples.rows("train", name)].sum()) for name, times in passes.items())
    held_out = sum(
        int(samples.num_tokens[rows].sum())
        for rows in heldout_rows(samples, config.evaluate.samples_per_source).values()
    )
    models = len(config.models)
    stages = stage_costs(
        cluster,
        capture_tokens=0 if config.teacher.kind == "api" else missing_tokens,
        rates=rates,
        ranks=config.teacher.ranks,
        replicas=config.teacher.replicas.max,
        train_tokens=round(drawn),
        workers=max(stage.train.workers for stage in config.chain()),
        trainings=models,
        evaluate_tokens=held_out * models,
    )
    head = cluster.node_type("head")
    prices = [cluster.price_per_hour, cluster.storage_price_per_gb_month]
    prices += [node_type.price_per_hour for node_type in cluster.node_types.values()]
    cost = RunCost(
        currency=config.budget.currency,
        stages=stages,
        head_price_per_hour=head.price_per_hour if head is not None else 0.0,
        api_expected=api["expected"] if api else 0.0,
        api_worst=api["worst"] if api else 0.0,
        dataset_bytes=dataset_bytes,
        storage_price_per_gb_month=cluster.storage_price_per_gb_month,
        priced=any(prices) or bool(api and api["priced"]),
        unknown=[stage.stage for stage in stages if stage.tokens_per_s is None],
    )
    return cost.to_json()


def _tokenizer(config: RunConfig, checks: list[str]) -> Tokenizer:
    embedded = config.teacher.name == "embedded"
    if embedded:
        folder = ensure_tokenizer(config.teacher.embedded, config.data)
    else:
        folder = resolve_model(config.teacher.name, config.teacher.revision, weights=False)
    tokenizer = Tokenizer.load(folder, config.data.chat_template)
    if embedded:
        positions: int | None = check_future_teacher(config, tokenizer)
    else:
        positions = check_teacher_fits(config, folder, tokenizer).max_positions
    if positions is not None:
        checks.append(f"windows of {config.data.window_tokens} tokens fit the teacher's {positions} positions")
    own = check_student(config, tokenizer)
    which = "the" if own is tokenizer else "its own"
    checks.append(f"the student's vocabulary and positions fit {which} tokenizer ({own.vocab_size} ids)")
    return tokenizer


def _identity(config: RunConfig, tokenizer: Tokenizer, checks: list[str], unknown: list[str]) -> DatasetIdentity | None:
    """The dataset's identity, where the teacher's weights are on this machine."""
    if config.teacher.kind == "api" and config.teacher.name != "embedded":
        light = resolve_model(config.teacher.name, config.teacher.revision, weights=False)
        return api_identity(light, config.teacher, config.cache, tokenizer, uses_chat_template(config.data))
    if config.teacher.name == "embedded":
        folder = find_teacher(config.teacher.embedded, config.data)
        why = "the embedded teacher is not trained yet (about two minutes on two cores)"
    else:
        light = resolve_model(config.teacher.name, config.teacher.revision, weights=False)
        folder = light if any(light.glob("*.safetensors")) else None
        why = f"the weights of {config.teacher.name} are not downloaded yet"
    if folder is None:
        unknown.append(f"what is cached already: {why}")
        return None
    facts = check_teacher_fits(config, folder, tokenizer)
    checks.append(f"teacher {config.teacher.name}: {facts.architecture}, vocabulary {facts.vocab_size}")
    return teacher_identity(folder, config.teacher, config.cache, tokenizer, uses_chat_template(config.data))


def _missing(
    config: RunConfig,
    tokenizer: Tokenizer,
    samples: SampleSet,
    rows: Int64Array,
    identity: DatasetIdentity | None,
) -> tuple[Int64Array, int, Dataset | None]:
    """Return the rows to be scored, how many are left out as refused, and the run's own dataset where there is one."""
    own = check_dataset(config, tokenizer, identity) is not None
    dataset = open_existing(config.cache, identity)
    measured = dataset.datasets[0] if dataset is not None and own else None
    if dataset is None or identity is None:
        return rows, 0, measured
    left = lacking(config.teacher, config.cache, samples, rows, identity, dataset)
    return left.rows, left.refused.total(), measured


def _assumed(config: RunConfig, tokenizer: Tokenizer, samples: SampleSet) -> float:
    """Bytes per supervised token before anything is captured."""
    width = _hidden_width(config) if config.cache.hidden else 0
    outcomes = tokenizer.vocab_size
    if config.teacher.task != "next_token":
        outcomes = model_facts(resolve_model(config.teacher.name, config.teacher.revision, weights=False)).num_classes
    stored = float(samples.num_tokens.sum()) / max(int(samples.num_supervised.sum()), 1)
    return bytes_per_token(config.cache, outcomes, width, stored)


def _hidden_width(config: RunConfig) -> int:
    if config.teacher.name == "embedded":
        return config.teacher.embedded.hidden_size
    folder = resolve_model(config.teacher.name, config.teacher.revision, weights=False)
    fields = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return int({**fields, **(fields.get("text_config") or {})}.get("hidden_size", 0))


def keep_plan(run: RunDir, plan: Plan) -> None:
    """Keep a plan for the report, which compares it with what happened; one with nothing left to do replaces none."""
    if plan.missing_samples or not run.store.exists(PLAN_KEY):
        facts = {"made": datetime.now(UTC).isoformat(timespec="milliseconds"), **plan.to_json()}
        run.store.write(PLAN_KEY, json.dumps(facts, indent=1).encode() + b"\n")
