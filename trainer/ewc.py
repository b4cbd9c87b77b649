"""Elastic weight consolidation (Kirkpatrick et al. 2017): (λ/2)·Σ F_i·(θ_i − θ*_i)², θ* the weights at the start.

F is the diagonal of the Fisher information on the sources to keep: the mean over supervised tokens of the squared
gradient of log p(y), with y drawn from the model itself. Each window is differentiated by itself: the square of a
batch's mean gradient would be smaller by about the size of the batch, and labels of the text would give the empirical
Fisher, which is another thing (Kunstner et al. 2019). Within a window draws are independent, so that the square of the
sum is in expectation the sum of the squares.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from storage.errors import InputError
from storage.permutation import permutation
from storage.sample_set import SampleSet
from storage.union import DatasetUnion
from trainer.alignment import Aligner
from trainer.batches import Batch
from trainer.checkpoint import random_seed
from trainer.collective import together
from trainer.config import EwcConfig
from trainer.engine import Place
from trainer.feed import microbatch
from trainer.model import predictor_logits
from trainer.sampler import rank_slice

Named = Mapping[str, Tensor]


class Anchor:
    """Holds weights and Fisher information; plain tensors, which no cast of the module touches."""

    def __init__(self, weight: float, start: Named, fisher: Named) -> None:
        """Take λ, and θ* and F by parameter name, float32."""
        self._weight, self._start, self._fisher = weight, start, fisher

    def penalty(self, model: nn.Module) -> Tensor:
        """Return (λ/2)·Σ F·(θ − θ*)² over the parameters that are trained, a float32 scalar."""
        named = dict(model.named_parameters())
        moved = {name: named[name].float() - start for name, start in self._start.items()}
        return (
            self._weight / 2 * torch.stack([(self._fisher[name] * moved[name].square()).sum() for name in moved]).sum()
        )


def fisher_information(
    model: nn.Module, windows: Sequence[Batch], seeds: Sequence[int]
) -> tuple[dict[str, Tensor], int]:
    """Return Σ (∇ Σ_t log p(y_t))² over windows, float32 by parameter name, and their supervised tokens.

    Args:
        model: the student; its gradients are used and cleared.
        windows: batches of one window each.
        seeds: of the draws of y, one for each window.
    """
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    squares = {name: torch.zeros_like(parameter, dtype=torch.float32) for name, parameter in named.items()}
    tokens = 0
    for window, seed in zip(windows, seeds, strict=True):
        logits = predictor_logits(model, window).float()
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.multinomial(logits.detach().softmax(-1).cpu(), 1, generator=generator)[:, 0].to(logits.device)
        loss = torch.nn.functional.cross_entropy(logits, drawn, reduction="sum")
        for (name, _), gradient in zip(named.items(), torch.autograd.grad(loss, list(named.values())), strict=True):
            squares[name] += gradient.float().square()
        tokens += window.num_supervised
    return squares, tokens


def anchor(
    model: nn.Module,
    ewc: EwcConfig,
    samples: SampleSet,
    dataset: DatasetUnion,
    earlier: Mapping[str, float],
    seed: int,
    place: Place,
    aligner: Aligner | None = None,
) -> Anchor:
    """Measure the Fisher information at the model's weights on the sources to keep. Collective; windows are shared out.

    Args:
        earlier: how many samples of each source the stages before have used.
        seed: of the choice of windows and of the draws.
        aligner: of a student with another tokenizer.
    """
    with together():
        ids = chosen_windows(ewc, samples, dataset, earlier, seed)
        mine = range(len(ids))[rank_slice(len(ids), place.rank, place.world_size)]
        windows = [microbatch(dataset.parts([ids[n]]), range(1), aligner=aligner).to(place.torch_device) for n in mine]
    was_training = model.training
    model.to(place.torch_device).eval()
    squares, tokens = fisher_information(model, windows, [random_seed(seed, n) for n in mine])
    model.train(was_training)
    total = torch.tensor(float(tokens), device=place.torch_device)
    for tensor in (total, *squares.values()):
        dist.all_reduce(tensor)
    start = {name: p.detach().float().clone() for name, p in model.named_parameters() if name in squares}
    return Anchor(ewc.weight, start, {name: square / total for name, square in squares.items()})


def chosen_windows(
    ewc: EwcConfig, samples: SampleSet, dataset: DatasetUnion, earlier: Mapping[str, float], seed: int
) -> list[bytes]:
    """Return training windows of the sources to keep, in the proportion in which they were used; at least one of each.

    Raises:
        InputError: there is no such source, or none at all, or the dataset holds nothing of it.
    """
    unknown = sorted(set(ewc.sources) - set(samples.source_names))
    if unknown:
        raise InputError(f"train.ewc.sources names {unknown[0]!r}; the sources are {', '.join(samples.source_names)}")
    used = {name: count for name, count in earlier.items() if count > 0}
    kept = {name: used.get(name, 1.0) for name in ewc.sources} or used
    if not kept:
        raise InputError(
            "train.ewc keeps what earlier stages have learned, but this is the first; name sources that the starting "
            "student knows in train.ewc.sources, or leave train.ewc out"
        )
    found: list[bytes] = []
    for name, count in kept.items():
        pool = dataset.held(sorted(samples.ids(samples.rows("train", name))))
        if not pool:
            raise InputError(f"train.ewc keeps {name!r}, of which {dataset.shown()} holds nothing; run the capture")
        size = max(1, round(ewc.samples * count / sum(kept.values())))
        found += [pool[n] for n in permutation(len(pool), "ewc", seed, name)[:size]]
    return found
