"""A capture in this process: real scoring and storing by one rank, without Ray."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from storage.config import CacheConfig
from storage.heads import FINAL, save_head
from storage.identity import DatasetIdentity
from storage.sample_set import SampleSet
from storage.writer import DatasetWriter
from workers.config import TeacherConfig
from workers.local.head import output_head
from workers.local.rank import CaptureJob, scoring_settings
from workers.local.scoring import merge_parts, score_part
from workers.result import CaptureResult


def capture_here(
    teacher: TeacherConfig,
    cache: CacheConfig,
    folder: Path,
    samples: SampleSet,
    rows: Any,
    identity: DatasetIdentity,
    *_: Any,
    **__: Any,
) -> CaptureResult:
    """Score all rows as one rank does, without Ray."""
    writer = DatasetWriter.create(cache.url, identity)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, teacher.dtype)).eval()
    if FINAL in identity.capture.hidden:
        save_head(writer.store, output_head(model, identity.tokenizer.vocab_size), identity.fingerprint)
    settings = scoring_settings(CaptureJob(teacher, folder, samples.url, cache.url, identity))
    batch = samples.read(rows)
    part = score_part(model, batch, settings, 0, 1, torch.device("cpu"))
    writer.commit("u", batch, merge_parts(batch, [part], settings), "a1")
    return CaptureResult(scored_samples=len(batch))
