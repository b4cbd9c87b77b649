"""What a student has lost on the way: the same held-out text scored by the student and by what it started from."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from storage.parts import TargetReader
from storage.samples import NO_LABEL
from trainer.alignment import Aligner
from trainer.evaluation import LOGIT_BYTES, evaluation_threads, held_out_batches, load_model, num_outputs
from trainer.feed import batch_of
from trainer.model import predictor_logits


def forgetting(
    model_folder: str | Path,
    start_folder: str | Path,
    dataset: TargetReader,
    ids_by_source: Mapping[str, Sequence[bytes]],
    device: str = "cpu",
    on_progress: Callable[[dict[str, Any]], None] | None = None,
    aligner: Aligner | None = None,
) -> dict[str, Any]:
    """Compare a student with the model that it started from, on held-out samples.

    Args:
        model_folder: the student.
        start_folder: what it started from, of the same vocabulary; both are run in float32.
        dataset: holds the samples.
        ids_by_source: held-out sample ids of each source.
        device: torch device.
        on_progress: called with `{"event": "evaluate", "done": samples, "total": samples}`.
        aligner: of students with another tokenizer than the dataset's.

    Returns:
        For each source `before` and `after` (nats per supervised token of start and student) and `kl`, the divergence
        KL(start ‖ student) per token over the whole vocabulary.
    """
    task = dataset.identity.capture.task
    start, model = (load_model(folder, device, task) for folder in (start_folder, model_folder))
    sums = {source: torch.zeros(4, dtype=torch.float64) for source, ids in ids_by_source.items() if ids}
    total, done = sum(len(ids) for ids in ids_by_source.values()), 0
    most = LOGIT_BYTES // (8 * num_outputs(model, task))
    for source, part in held_out_batches(dataset, ids_by_source, most):
        batch = batch_of([part], aligner=aligner).to(device)
        with torch.inference_mode(), evaluation_threads():
            before, after = (predictor_logits(one, batch).float().log_softmax(-1) for one in (start, model))
            label = batch.targets.label
            said = label != NO_LABEL
            kl = (before.exp() * (before - after)).sum(1)[said].sum()
            own = [-one.gather(1, label.clamp_min(0)[:, None])[said].sum() for one in (before, after)]
            values = [*own, kl, said.sum()]
        sums[source] += torch.stack(values).double().cpu()
        done += len(part.samples)
        if on_progress is not None:
            on_progress({"event": "evaluate", "done": done, "total": total})
    return {
        source: dict(zip(("before", "after", "kl"), (row[:3] / row[3].clamp_min(1)).tolist(), strict=True))
        for source, row in sums.items()
    }
