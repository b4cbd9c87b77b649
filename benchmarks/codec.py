"""What a supervised token costs in the Parquet file, all columns counted, against published encodings; codec rates.

    python benchmarks/codec.py                                  # the simulated regimes, V = 151,936
    python benchmarks/codec.py --case embedded --case bpe32k    # real distributions of teachers trained here once

*Draws*: kind `sampled` with the least n whose squared error Σ(t̂ − t)² is no worse than that of 50 multinomial draws on
the same distributions, beside the published encoding of such draws: 17-bit id and 7-bit count, 3 bytes for each
distinct id. `--factor` takes so many times these draws, beside the same encoding of 50. *Top-64*: kind `topk`,
log-probabilities within 0.01 nats, beside DistillKit's own formula at that k and vocabulary (16 exact bfloat16 values,
6 float32 terms, bit-packed ids: its recommended settings).

The simulated teachers have Zipf frequencies with normal noise on the logits, each position at its own temperature; the
text is drawn from the teacher. `published`: 50 draws give about 12 distinct ids. `sharp`: mean entropy 0.5 to 0.7 nats.
The noise is drawn anew for every id at every position, so that no context, no earlier position and no other id tells
anything of an id but how frequent it is. What no code of top-64 can therefore undercut on average stands beside it:
`ideal_id_bits` and `ideal_logprob_bits` of a position, for one that knows the simulation, and `ideal_bytes_per_token`,
these and the other columns. Where ids follow context, as they do in every teacher that was trained, lists are shorter.
`bpe32k` is a 2-layer model of width 128 with a BPE of 32,768 trained on the embedded corpora.
"""

import argparse
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import numpy as np
import pyarrow.parquet as pq
import torch
import yaml
from torch import Tensor

from storage.codecs.steps import steps_of
from storage.codecs.table import decode, encode
from storage.config import DataConfig
from storage.identity import CaptureIdentity, DatasetIdentity, TeacherIdentity, TokenizerIdentity
from storage.sample_set import prepare_samples
from storage.samples import Int64Array, Sample, SampleBatch, offsets_of
from storage.schema import from_parquet, to_parquet
from storage.targets import TargetBatch
from storage.tokenizer import Tokenizer
from workers.config import EmbeddedTeacherConfig
from workers.embedded import ensure_teacher
from workers.local.selection import Selection, SelectionSettings, select, uniforms

VOCAB_SIZE = 151_936
WINDOW = 256
MULTINOMIAL = 50
TOP_K = 64
MOST_DRAWS = 256
"""Draws whose error is known; a token is stored to have been drawn 255 times at most."""
NOISE = 2.0
"""Standard deviation of an id's simulated logit about its mean, before the position's sharpness."""
# Mean and spread of the log of each position's inverse temperature.
SIMULATED = {"published": (0.75, 0.4), "sharp": (1.62, 0.5)}
TEACHERS = {
    "embedded": EmbeddedTeacherConfig(),
    "bpe32k": EmbeddedTeacherConfig(vocab_size=32_768, hidden_size=128, layers=2),
}
QUICKSTART = Path(__file__).parent.parent / "examples" / "quickstart.yaml"


Case = tuple[SampleBatch, TargetBatch, int, "Errors"]
"""Samples, what is kept of their targets, the number of draws, what the distributions tell."""


class Errors:
    """Squared error of 50 multinomial draws and of n systematic ones, summed over positions, and their entropies."""

    def __init__(self) -> None:
        self.positions = 0
        self.entropy = self.distinct = self.multinomial = 0.0
        self.ideal_bits: tuple[float, float] | None = None
        """Of top-64 by an ideal code, ids and log-probabilities of a position; known of simulated teachers alone."""
        self.systematic = np.zeros(MOST_DRAWS)

    def add(self, t: Tensor) -> None:
        """Add distributions, [P, V]."""
        self.positions += len(t)
        self.entropy += float(torch.special.entr(t).sum())
        self.distinct += float((1 - (1 - t) ** MULTINOMIAL).sum())
        self.multinomial += float((1 - (t * t).sum(1)).sum()) / MULTINOMIAL
        # Below 1/n an entry is drawn at most once: its n·t has no whole part, and Σ f(1 − f) has a closed form.
        large = t.topk(MOST_DRAWS).values.double()
        large = large * (large >= 1 / MOST_DRAWS)
        rest = float(t.double().sum() - large.sum())
        squares = float((t * t).sum() - (large * large).sum())
        for n in range(1, MOST_DRAWS):
            fraction = (n * large).frac()
            self.systematic[n] += float((fraction * (1 - fraction)).sum()) / n**2 + rest / n - squares

    def draws(self, factor: float = 1.0) -> int:
        """Return `factor` times the least n that is no worse."""
        return round(factor * (1 + int(np.flatnonzero(self.systematic[1:] <= self.multinomial)[0])))


def simulate(regime: str, windows: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield of each window the logits of its supervised positions, float32 [WINDOW − 1, V], and what they are made of.

    That is the sharpness of each position, [WINDOW − 1, 1], and the mean of each id's logit before it, [V].
    """
    mean, spread = SIMULATED[regime]
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(VOCAB_SIZE, generator=generator)
    unigram = -1.05 * torch.log(order + 3.0)
    for _ in range(windows):
        noise = torch.randn(WINDOW - 1, VOCAB_SIZE, generator=generator)
        sharpness = torch.exp(mean + spread * torch.randn(WINDOW - 1, 1, generator=generator))
        yield noise.mul_(NOISE).add_(unigram).mul_(sharpness), sharpness, unigram


def ideal_bits(logits: Tensor, sharpness: Tensor, unigram: Tensor) -> tuple[float, float]:
    """Return the mean −log2 of the probability of top-64's ids, and of their log-probabilities' cells given these.

    Under the simulation z = logit / sharpness is normal about `unigram`. Given the least kept one, ids are kept
    independently of each other and each kept z has the tail of its normal distribution; how far the log-probabilities
    lie above the least tells these z. The code is told sharpness, least z and least log-probability for nothing.
    """
    kept = logits.topk(TOP_K)
    mean = unigram[kept.indices]
    least = kept.values[:, -1:] / sharpness
    inside = torch.special.log_ndtr(((mean - least) / NOISE).double())
    outside = torch.special.log_ndtr(((least - unigram) / NOISE).double())
    ids = -inside.sum(1) - outside.sum(1) + outside.gather(1, kept.indices).sum(1)
    every = np.arange(0x8000, 0xFC00, dtype=np.uint16).view(np.float16)
    cell = steps_of(every)
    width = torch.from_numpy(np.diff(every[np.flatnonzero(np.diff(cell, prepend=-1))].astype(np.float64)) * -1.0)
    logprob = (kept.values - logits.logsumexp(1, keepdim=True)).half().numpy()
    above = (kept.values / sharpness - mean) / NOISE
    density = -(above**2) / 2 - torch.log(math.sqrt(2 * math.pi) * NOISE * sharpness)
    values = (inside - density - torch.log(width[torch.from_numpy(steps_of(logprob))]))[:, :-1].sum(1)
    return tuple(float(nats.mean()) / math.log(2) for nats in (ids, values))  # type: ignore[return-value]


def simulated(regime: str, windows: int, factor: float) -> dict[str, Case]:
    """Return simulated samples with drawn and with top-64 targets."""
    errors, draws = Errors(), 0
    samples: list[Sample] = []
    kept: dict[str, list[Selection]] = {"sampled": [], "topk": []}
    generator = torch.Generator().manual_seed(1)
    for logits, sharpness, unigram in simulate(regime, windows):
        probability = logits.softmax(1)
        if not draws:
            errors.add(probability)
            errors.ideal_bits = ideal_bits(logits, sharpness, unigram)
            draws = errors.draws(factor)
        truth = torch.multinomial(probability, 1, generator=generator)[:, 0]
        tokens = np.concatenate([[0], truth.numpy()]).astype(np.int32)
        sample = Sample("general", tokens, np.arange(WINDOW) > 0, np.zeros(WINDOW, dtype=np.int16))
        samples.append(sample)
        uniform = torch.from_numpy(uniforms(0, sample.sample_id, WINDOW - 1))
        for kind, parts in kept.items():
            how = selection(kind, VOCAB_SIZE, draws)
            parts.append(select(logits, torch.arange(WINDOW - 1), truth, uniform, how))
    batch = SampleBatch.of(samples)
    return {kind: (batch, targets_of(batch, Selection.concat(parts)), draws, errors) for kind, parts in kept.items()}


def selection(kind: str, vocab_size: int, draws: int = 0) -> SelectionSettings:
    """Return what is to be kept."""
    return SelectionSettings(kind=kind, top_k=TOP_K, draws=draws, vocab_size=vocab_size)  # type: ignore[arg-type]


def targets_of(samples: SampleBatch, kept: Selection) -> TargetBatch:
    """Return a selection over all positions of the samples, in order, as targets."""
    return targets_at(offsets_of(samples.num_supervised()), kept)


def targets_at(offsets: Int64Array, kept: Selection) -> TargetBatch:
    """Return a selection as the targets of the samples whose positions start and end at `offsets`, [N + 1]."""
    means = [np.add.reduceat(x, offsets[:-1]) / np.diff(offsets) for x in (kept.nll, kept.entropy)]
    return TargetBatch(
        offsets=offsets,
        count=kept.count,
        id=kept.id,
        logprob=kept.logprob,
        draws=kept.draws,
        tail_mass=kept.tail_mass,
        teacher_nll=means[0].astype(np.float32),
        teacher_entropy=means[1].astype(np.float32),
    )


def real(teacher: EmbeddedTeacherConfig, windows: int, factor: float) -> dict[str, Case]:
    """Return samples of a teacher trained here, with drawn and with top-64 targets."""
    from transformers import AutoModelForCausalLM

    data = DataConfig.model_validate(yaml.safe_load(QUICKSTART.read_text(encoding="utf-8"))["data"])
    folder = ensure_teacher(teacher, data)
    tokenizer = Tokenizer.load(folder)
    samples = prepare_samples(data, tokenizer, folder.parent / f"{folder.name}-benchmark-samples")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    half = windows // 2
    rows = np.concatenate([samples.rows("train", source)[:half] for source in samples.source_names])
    batch = samples.read(rows)
    errors, result = Errors(), {}
    for row in range(0, len(batch), max(1, len(batch) // 16)):
        errors.add(window_logits(model, batch.sample(row)).float()[:, : tokenizer.vocab_size].softmax(1))
    draws = errors.draws(factor)
    kept: dict[str, list[Selection]] = {"sampled": [], "topk": []}
    for row in range(len(batch)):
        sample = batch.sample(row)
        at = np.flatnonzero(sample.supervised)
        where, truth = torch.from_numpy(at - 1), torch.from_numpy(sample.tokens[at].astype(np.int64))
        logits = window_logits(model, sample, every=True)
        uniform = torch.from_numpy(uniforms(0, sample.sample_id, len(at)))
        for kind, parts in kept.items():
            parts.append(select(logits, where, truth, uniform, selection(kind, tokenizer.vocab_size, draws)))
    for kind, parts in kept.items():
        result[kind] = (batch, targets_of(batch, Selection.concat(parts)), draws, errors)
    return result


@torch.no_grad()
def window_logits(model: torch.nn.Module, sample: Sample, every: bool = False) -> Tensor:
    """Return the logits of a window, [L, V], of its supervised positions alone unless `every`.

    Packed documents see each other here, which matters nothing for what is measured.
    """
    logits = model(input_ids=torch.from_numpy(sample.tokens.astype(np.int64))[None]).logits[0]
    return logits if every else logits[torch.from_numpy(np.flatnonzero(sample.supervised) - 1)]  # type: ignore[no-any-return]


def measure(
    case: str, kind: str, vocab_size: int, samples: SampleBatch, targets: TargetBatch, draws: int, errors: Errors
) -> dict[str, object]:
    """Return the figures of one case as JSON values."""
    identity = DatasetIdentity(
        teacher=TeacherIdentity(name=case, architecture="benchmark", weights="0" * 64, parameters=0),
        tokenizer=TokenizerIdentity(digest="0" * 64, vocab_size=vocab_size),
        precision="bfloat16",
        capture=CaptureIdentity.model_validate(
            {"kind": kind, "draws": draws, "seed": 0} if kind == "sampled" else {"kind": kind, "top_k": TOP_K}
        ),
    )
    positions = targets.num_positions
    files = {codec: to_parquet(encode(samples, targets, identity, codec)) for codec in ("plain", "compact")}  # type: ignore[arg-type]
    compact = len(files["compact"]) / positions
    if kind == "sampled":
        peer = 3.0 * errors.distinct / errors.positions
        about = {
            "draws": draws,
            "entries": round(len(targets.id) / positions, 2),
            "distinct_of_50": round(errors.distinct / errors.positions, 2),
            "error_ratio": round(errors.systematic[draws] / errors.multinomial, 4),
        }
    else:
        peer = 56 + math.ceil(TOP_K * math.ceil(math.log2(vocab_size)) / 8)
        about = {"entries": TOP_K}
    columns = column_bytes(files["compact"])
    if kind == "topk" and errors.ideal_bits:
        bits = dict(zip(("ideal_id_bits", "ideal_logprob_bits"), errors.ideal_bits, strict=True))
        others = sum(size for name, size in columns.items() if not name.startswith("target_")) / positions
        bits["ideal_bytes_per_token"] = sum(errors.ideal_bits) / 8 + others
        about |= {name: round(value, 2) for name, value in bits.items()}
    return {
        "benchmark": "codec",
        "case": case,
        "kind": kind,
        "vocab_size": vocab_size,
        "positions": positions,
        "entropy_nats": round(errors.entropy / errors.positions, 3),
        **about,
        "bytes_per_token": round(compact, 3),
        "plain_bytes_per_token": round(len(files["plain"]) / positions, 3),
        "published_bytes_per_token": round(peer, 2),
        "ratio": round(compact / peer, 4),
        "columns": {name: round(size / positions, 3) for name, size in columns.items()},
        **rates(samples, targets, identity, files["compact"]),
    }


def column_bytes(file: bytes) -> dict[str, int]:
    """Return the compressed bytes of each column of a Parquet file."""
    import pyarrow as pa

    metadata = pq.ParquetFile(pa.BufferReader(file)).metadata
    sizes: dict[str, int] = {}
    for group in range(metadata.num_row_groups):
        for n in range(metadata.num_columns):
            column = metadata.row_group(group).column(n)
            name = column.path_in_schema.split(".")[0]
            sizes[name] = sizes.get(name, 0) + column.total_compressed_size
    return sizes


def rates(samples: SampleBatch, targets: TargetBatch, identity: DatasetIdentity, file: bytes) -> dict[str, int]:
    """Return positions encoded and decoded in a second, Parquet included, by one thread; medians of three."""
    encoded, decoded = [], []
    for _ in range(3):
        start = time.perf_counter()
        to_parquet(encode(samples, targets, identity, "compact"))
        encoded.append(time.perf_counter() - start)
        start = time.perf_counter()
        decode(from_parquet(file))
        decoded.append(time.perf_counter() - start)
    positions = targets.num_positions
    return {
        "encode_positions_per_s": round(positions / median(encoded)),
        "decode_positions_per_s": round(positions / median(decoded)),
    }


def main() -> None:
    """Print one JSON line for each case and kind."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", action="append", choices=[*SIMULATED, *TEACHERS], help="repeatable")
    parser.add_argument("--windows", type=int, default=64, help="windows of 256 tokens")
    parser.add_argument("--factor", type=float, default=1.0, help="times the draws of equal error")
    parser.add_argument("--train-tokens", type=int, default=300_000, help="of the teachers trained here")
    arguments = parser.parse_args()
    for case in arguments.case or list(SIMULATED):
        if case in SIMULATED:
            found = simulated(case, arguments.windows, arguments.factor)
            vocab_size = VOCAB_SIZE
        else:
            found = real(
                TEACHERS[case].model_copy(update={"train_tokens": arguments.train_tokens}),
                arguments.windows,
                arguments.factor,
            )
            vocab_size = TEACHERS[case].vocab_size
        for kind, (samples, targets, draws, errors) in found.items():
            print(json.dumps(measure(case, kind, vocab_size, samples, targets, draws, errors)), flush=True)


if __name__ == "__main__":
    main()
