"""What a reader of one or of several datasets hands over: the asked samples, by the dataset that serves them."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

from storage.catalog import SampleIds
from storage.identity import CaptureIdentity, DatasetIdentity
from storage.open_shard import OpenShard, Run, join
from storage.samples import Int32Array, Int64Array, SampleBatch
from storage.targets import TargetBatch


@dataclass(frozen=True, eq=False)
class Part:
    """The asked samples that one dataset serves."""

    capture: CaptureIdentity
    """What that dataset keeps: decides how its targets are read."""
    asked: Int64Array  # [N], rising: which of the asked samples these are
    samples: SampleBatch  # N
    targets: TargetBatch  # N
    label: Sequence[Int32Array | None] = ()  # [N], classes of the supervised tokens; none where nobody says any

    def between(self, first: int, last: int) -> "Part":
        """Return samples `first` to `last` of this part, without an index over their entries."""
        run = join([Run(self._open, first, last)])
        return Part(self.capture, self.asked[first:last], *run, label=self.label[first:last])

    @cached_property
    def _open(self) -> OpenShard:
        return OpenShard.of((self.samples, self.targets))


class TargetReader(Protocol):
    """What can be trained on: a dataset, or several."""

    @property
    def identity(self) -> DatasetIdentity:
        """Identity of the dataset, or of the first one."""

    def missing(self, sample_ids: SampleIds) -> Int64Array:
        """Return the indices of the asked samples that no dataset holds."""

    def parts(self, sample_ids: SampleIds) -> list[Part]:
        """Return the asked samples, one part for each dataset that serves some."""
