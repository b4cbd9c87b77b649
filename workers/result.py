"""What a capture did, counted unit by unit."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from workers.local.rank import UnitReceipt
from workers.loop import FleetLoop
from workers.units import WorkUnit


@dataclass
class CaptureResult:
    """What a capture did. Seconds of `forward_s`, `selection_s` and `commit_s` are summed over units."""

    scored_samples: int = 0
    reused_samples: int = 0
    """In the dataset before, or put there by another capture meanwhile."""
    tokens: int = 0
    """Tokens of the scored samples."""
    seconds: float = 0.0
    """Wall-clock time from the first ready replica to the last receipt."""
    forward_s: float = 0.0
    selection_s: float = 0.0
    commit_s: float = 0.0
    padded_tokens: int = 0
    """Tokens of the forward passes, padding included."""
    refused: dict[str, int] = field(default_factory=dict)
    """Reason → samples that the teacher refuses, those of earlier captures included."""
    failed_units: list[dict[str, Any]] = field(default_factory=list)
    """Units set aside: `{unit, samples, attempts, error}`."""
    ranks: list[dict[str, Any]] = field(default_factory=list)
    """What each rank of the first replica held: `{rank, parameters_held, parameters_total, replicated}`."""
    replicas_lost: int = 0
    fleet: dict[str, Any] = field(default_factory=dict)
    """The fleet at the end, see `meter.FleetStatus`: machine seconds, idle seconds, their cost."""

    @property
    def tokens_per_s(self) -> float:
        """Tokens scored per second of wall-clock time, all replicas together."""
        return self.tokens / self.seconds if self.seconds else 0.0

    @property
    def forward_tokens_per_s(self) -> float:
        """Tokens per second of one replica's forward passes alone."""
        return self.tokens / self.forward_s if self.forward_s else 0.0

    @property
    def efficiency(self) -> float:
        """Share of the replicas' working time that went into forward passes."""
        busy = self.forward_s + self.selection_s + self.commit_s
        return self.forward_s / busy if busy else 0.0

    @property
    def padding(self) -> float:
        """Share of the forward passes' tokens that were padding."""
        return 1 - self.tokens / self.padded_tokens if self.padded_tokens else 0.0

    def add(self, unit: WorkUnit, receipt: UnitReceipt) -> dict[str, Any]:
        """Count a unit; returns the facts of its `unit_done` event."""
        if not receipt.scored:
            self.reused_samples += len(unit.rows)
            return {"samples": 0, "tokens": unit.num_tokens, "committed_elsewhere": True}
        done = receipt.receipt
        samples, tokens, size = (done.rows, done.tokens, done.bytes) if done is not None else (0, 0, 0)
        self.scored_samples += samples
        self.tokens += tokens
        self.forward_s += receipt.forward_s
        self.selection_s += receipt.selection_s
        self.commit_s += receipt.commit_s
        self.padded_tokens += receipt.padded_tokens
        return {
            "samples": samples,
            "tokens": unit.num_tokens,
            "bytes": size,
            "refused": len(receipt.refused),
            "padded_tokens": receipt.padded_tokens,
            "batch_tokens": receipt.batch_tokens,
            "forward_s": round(receipt.forward_s, 4),
            "selection_s": round(receipt.selection_s, 4),
            "commit_s": round(receipt.commit_s, 4),
        }

    def run(self, loop: FleetLoop[WorkUnit], refused: Mapping[str, int]) -> None:
        """Let a fleet work, and `close` however it ends."""
        try:
            loop.run()
        finally:
            self.close(loop, refused)

    def close(self, loop: FleetLoop[WorkUnit], refused: Mapping[str, int]) -> None:
        """Take from a fleet what it was and what it could not do, and from the teacher what it would not do."""
        self.refused = dict(refused)
        self.failed_units, self.replicas_lost = loop.failed_units, loop.replicas_lost
        self.seconds, self.fleet = loop.seconds, loop.status().to_json()
        self.ranks = loop.first_report or []
