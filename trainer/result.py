"""What a run depends on, and what a finished one did."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from hashlib import blake2b
from itertools import pairwise
from typing import Any, Self

from storage.errors import InputError
from storage.info import read_info
from storage.object_store import Store
from trainer.sampler import PlannedOrder
from trainer.spec import Training

RESULT_FILE = "train_result.json"
"""Written last into the exported folder: a run that has it is done."""

MIXTURE_POINTS = 200
"""Most points of `TrainResult.mixture`."""

OPERATIONAL = frozenset(
    {
        *("checkpoint_every", "keep_checkpoints", "max_failures", "log_every", "trackers", "peak_flops"),
        *("workers", "min_workers", "grow_every_s", "micro_batch_size"),
    }
)
"""Fields of `train` that may change between a run and its continuation."""


@dataclass(frozen=True)
class TrainResult:
    """What a finished run did."""

    name: str
    path: str
    """Folder of the exported student."""
    parameters: int
    steps: int
    tokens: int
    """Tokens consumed, as the dataset's tokenizer counts them, padding not counted."""
    seconds: float
    """Time spent in steps, waiting for data included, start-up and checkpoints not."""
    tokens_per_s: float
    """As the student's own tokenizer counts them."""
    data_wait_fraction: float
    losses: dict[str, float]
    """Of the last step: loss, ce, kl, hidden, ewc (per supervised token) and grad_norm."""
    order_digest: str
    """Hex running digest of all sample ids in the order in which they were consumed."""
    mixture: list[dict[str, Any]]
    """`{step, planned, realised}`: shares of the sources, averaged over the steps since the point before."""
    resumed_from: int
    """Step that the last start continued from, 0 for none."""
    mixing: list[dict[str, Any]] = field(default_factory=list)
    """What an adaptive curriculum decided: `{step, shares, student, teacher}`, with the held-out losses of both."""

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        """Read what `to_json` returned."""
        return cls(**values)


def run_facts(training: Training, samples_key: str) -> dict[str, Any]:
    """Return, as flat `section.field` values, everything that the trained weights depend on.

    `samples_key` is the fingerprint of the prepared samples.
    """
    student, curriculum = training.student.model_dump(mode="json"), training.curriculum.model_dump(mode="json")
    if training.after is None:
        del curriculum["replay"]  # of nothing
    else:
        student = {"after": training.after, "frozen": student["frozen"], "lora": student["lora"]}
    dataset: dict[str, Any] = {"fingerprint": training.identity.fingerprint}
    if training.also:
        dataset["also"] = [read_info(Store(url)).fingerprint for url in training.also]
    if training.mixing is not None:
        curriculum["follows"] = [[decision["step"], decision["shares"]] for decision in training.mixing]
    train = {k: v for k, v in training.train.model_dump(mode="json").items() if k not in OPERATIONAL}
    sections = {
        "student": student,
        "curriculum": curriculum,
        "train": train,
        "dataset": dataset,
        "samples": {"key": samples_key},
    }
    if training.left_out:
        sections["samples"]["left_out"] = blake2b(b"".join(training.left_out), digest_size=16).hexdigest()
    return dict(_flatten(sections, ""))


def recorded_result(run_dir: str, name: str, facts: dict[str, Any]) -> TrainResult | None:
    """Return the result of a finished run, or none; InputError when it was made with another config."""
    store = Store(run_dir)
    raw = store.read_if_exists(f"{name}/{RESULT_FILE}")
    if raw is None:
        return None
    record = json.loads(raw)
    require_same_config(facts, record["config"], store.shown(name))
    return TrainResult.from_json(record["result"])


def require_same_config(expected: Mapping[str, Any], found: Mapping[str, Any], where: str) -> None:
    """Raise InputError naming the first field in which a checkpoint or finished run differs from this one."""
    free = {f"train.{field}" for field in OPERATIONAL}
    for name in dict.fromkeys([*expected, *found]):
        if name not in free and expected.get(name) != found.get(name):
            raise InputError(
                f"{where} was made with {name} = {found.get(name)!r}, this run has {expected.get(name)!r}; go back to "
                "that value, use another --run-dir, or delete it to start over"
            )


def _flatten(value: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from _flatten(item, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, value


def mixture(order: PlannedOrder, points: int = MIXTURE_POINTS) -> list[dict[str, Any]]:
    """Return planned and realised shares over the steps, each averaged over the steps since the point before.

    The realised ones are those of the planned order: a run ends only when its digest shows that it consumed it.
    """
    edges = sorted({round(len(order) * n / points) for n in range(points + 1)})
    rows = []
    for first, last in pairwise(edges):
        planned = order.shares[first:last].mean(axis=0)
        realised = order.counts[first:last].mean(axis=0) / order.batch_size
        rows.append(
            {
                "step": last,
                "planned": dict(zip(order.sources, planned.tolist(), strict=True)),
                "realised": dict(zip(order.sources, realised.tolist(), strict=True)),
            }
        )
    return rows
