"""What a run costs: hours of machines, an API, storage. Pure arithmetic; every figure says what it was made of."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from cluster.config import ClusterConfig, NodeTypeConfig
from cluster.rates import Rates

FORWARD_SHARE = 1 / 3
"""Work of a forward pass as a share of a training step: forward, and a backward pass of twice its operations
(Kaplan et al. 2020, arXiv:2001.08361, section 2.1: C ≈ 2N forward, 6N in all, per token)."""


@dataclass(frozen=True)
class StageCost:
    """Machines of one stage for its hours."""

    stage: str
    tokens: int
    """Tokens that go through the model."""
    tokens_per_s: float | None
    """Rate of all its machines together; None where it is not known."""
    nodes: int
    node_type: str | None
    price_per_hour: float
    """Of one node."""
    start_s: float = 0.0
    """Seconds to start and to end it, as measured before; 0 where they are not known."""

    @property
    def hours(self) -> float | None:
        """Wall-clock hours: tokens / rate, and the start."""
        return (self.tokens / self.tokens_per_s + self.start_s) / 3600 if self.tokens_per_s else None

    @property
    def node_hours(self) -> float | None:
        """Hours × nodes."""
        return None if self.hours is None else self.hours * self.nodes

    @property
    def cost(self) -> float | None:
        """Node-hours × price."""
        return None if self.node_hours is None else self.node_hours * self.price_per_hour

    def to_json(self) -> dict[str, Any]:
        """Return the figures with what follows from them."""
        return {**asdict(self), "hours": self.hours, "node_hours": self.node_hours, "cost": self.cost}


@dataclass(frozen=True)
class RunCost:
    """Everything that a run costs, in one currency; `total` counts what is known, `unknown` names what is not."""

    currency: str
    stages: Sequence[StageCost]
    head_price_per_hour: float
    api_expected: float
    api_worst: float
    dataset_bytes: int
    """Of the dataset when the capture is done."""
    storage_price_per_gb_month: float
    priced: bool = False
    """Whether the config names any price at all."""
    unknown: list[str] = field(default_factory=list)

    @property
    def hours(self) -> float:
        """Wall-clock hours of the stages whose rate is known, one after the other."""
        return sum(stage.hours or 0.0 for stage in self.stages)

    @property
    def machines(self) -> float:
        """Price of all machines, the head for all of the hours."""
        return sum(stage.cost or 0.0 for stage in self.stages) + self.hours * self.head_price_per_hour

    @property
    def storage_per_month(self) -> float:
        """Price of keeping the dataset for a month."""
        return self.dataset_bytes / 1e9 * self.storage_price_per_gb_month

    def to_json(self) -> dict[str, Any]:
        """Return the figures as JSON values."""
        return {
            "currency": self.currency,
            "stages": [stage.to_json() for stage in self.stages],
            "hours": self.hours,
            "head": self.hours * self.head_price_per_hour,
            "machines": self.machines,
            "api_expected": self.api_expected,
            "api_worst": self.api_worst,
            "expected": self.machines + self.api_expected,
            "worst": self.machines + self.api_worst,
            "dataset_bytes": self.dataset_bytes,
            "storage_per_month": self.storage_per_month,
            "priced": self.priced,
            "unknown": self.unknown,
        }


def num_nodes(num_ranks: int, node_type: NodeTypeConfig | None, gpu: bool) -> int:
    """Return how many nodes a group of ranks fills; 1 where the config does not say what a node offers.

    A rank takes one GPU where the node type has some (`gpu` true asks for one), else one CPU.
    """
    if node_type is None:
        return 1
    resources = node_type.resources
    per_node = resources.get("GPU", 0.0) if gpu or resources.get("GPU") else resources.get("CPU", 0.0)
    return max(1, math.ceil(num_ranks / per_node)) if per_node >= 1 else 1


def price_of_replica(cluster: ClusterConfig, ranks: int) -> float:
    """Return the price per hour of the machines of one replica of a local teacher."""
    node_type = cluster.node_type("capture")
    if node_type is None:
        return cluster.price_per_hour
    # Several replicas may share a node: then each costs its share.
    gpus = node_type.resources.get("GPU") or node_type.resources.get("CPU") or ranks
    return node_type.price_per_hour * (ranks / gpus if ranks < gpus else num_nodes(ranks, node_type, cluster.uses_gpus))


def stage_costs(
    cluster: ClusterConfig,
    *,
    capture_tokens: int,
    rates: Rates,
    ranks: int,
    replicas: int,
    train_tokens: int,
    workers: int,
    trainings: int,
    evaluate_tokens: int,
) -> list[StageCost]:
    """Return the cost of the stages in their order; those without work are left out.

    Args:
        capture_tokens: tokens that the teacher's machines score (0 for one behind an API).
        rates: where that of the evaluation is not known, it is told from the training's, see `FORWARD_SHARE`.
        train_tokens: of one training.
        trainings: models that are trained: 2 with a baseline, for each seed.
        evaluate_tokens: held-out tokens, of all models together.
    """
    gpu = cluster.uses_gpus
    on_capture, on_train, on_evaluate = (cluster.node_type(stage) for stage in ("capture", "train", "evaluate"))
    evaluate_rate = rates.evaluate or (rates.train / workers / FORWARD_SHARE if rates.train else None)
    if on_capture is None:
        capture_nodes, price = replicas, cluster.price_per_hour
    else:
        capture_nodes, price = num_nodes(ranks * replicas, on_capture, gpu), on_capture.price_per_hour
    placed = cluster.placement
    made = [
        StageCost(
            "capture", capture_tokens, rates.capture, capture_nodes, placed.capture, price, rates.capture_start_s
        ),
        StageCost(
            "train",
            train_tokens * trainings,
            rates.train,
            num_nodes(workers, on_train, gpu),
            placed.train,
            on_train.price_per_hour if on_train else 0.0,
            rates.train_start_s * trainings,
        ),
        StageCost(
            "evaluate",
            evaluate_tokens,
            evaluate_rate,
            1,
            placed.evaluate,
            on_evaluate.price_per_hour if on_evaluate else 0.0,
        ),
    ]
    return [stage for stage in made if stage.tokens]
