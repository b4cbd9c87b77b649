"""Students: from a folder or a config to a model, and the module that turns a batch into a loss."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from storage.errors import InputError
from storage.heads import FINAL, Head
from storage.identity import DatasetIdentity
from storage.tokenizer import Tokenizer
from trainer.batches import Batch
from trainer.config import LossConfig, StudentConfig
from trainer.losses import FullTeacher, HeadTerms, chosen_divergence, head_loss, logits_loss
from trainer.losses.balance import Balance
from trainer.losses.hidden import HiddenTransfer
from trainer.schedules import value_at

HeadPath = Literal["fused", "module", "model"]
"""How logits come about: the head's weight chunk by chunk, the head's own forward, or the whole model's."""

TERMS = ("ce", "kl", "hidden")
"""Terms of the loss, by the names of their weights in the config."""

_PROBE_TOKENS = 4


def resolve_student(student: StudentConfig, identity: DatasetIdentity) -> str | None:
    """Return the local folder of a student that starts from a model, none for a fresh one, after cheap checks.

    Raises:
        InputError: there is no such model, its tokenizer is not the dataset's, or its vocabulary is too small.
    """
    folder = None if student.path is None else str(_local_folder(student.path))
    if folder is not None:
        digest = Tokenizer.load(folder).digest
        if digest != identity.tokenizer.digest:
            raise InputError(
                f"the tokenizer of student {student.path} ({digest[:12]}…) is not the one that the dataset was "
                f"captured with ({identity.tokenizer.digest[:12]}…); token targets need a student of the same tokenizer"
            )
    vocab_size = int(student_config(student, folder, identity).get_text_config().vocab_size)
    if vocab_size < identity.tokenizer.vocab_size:
        raise InputError(
            f"the student's vocabulary has {vocab_size} entries, but the dataset's tokenizer needs "
            f"{identity.tokenizer.vocab_size}; leave student.config.vocab_size out to have it filled in, or start from "
            "a model of the same tokenizer"
        )
    return folder


def student_config(student: StudentConfig, folder: str | None, identity: DatasetIdentity) -> Any:
    """Return the transformers config of the student."""
    from transformers import AutoConfig

    if folder is not None:
        return AutoConfig.from_pretrained(folder)
    fields = {"vocab_size": identity.tokenizer.vocab_size, **(student.config or {})}
    try:
        return AutoConfig.for_model(**fields)
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"student.config is not a transformers config: {error}") from error


def build_student(student: StudentConfig, folder: str | None, identity: DatasetIdentity) -> Any:
    """Return the student in float32: loaded from `folder`, or fresh with weights that depend on the seed alone."""
    from transformers import AutoModelForCausalLM

    if folder is not None:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config = student_config(student, folder, identity)
    with torch.random.fork_rng():
        torch.manual_seed(student.seed)
        try:
            return AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        except (ValueError, TypeError, ZeroDivisionError) as error:
            raise InputError(f"student.config does not make a causal language model: {error}") from error


def freeze(model: nn.Module, patterns: Sequence[str]) -> int:
    """Keep the parameters whose names match any pattern as they are; returns how many values that are.

    Raises:
        InputError: a pattern matches nothing, or nothing is left to train.
    """
    named = dict(model.named_parameters())
    frozen: set[str] = set()
    for pattern in patterns:
        matched = [name for name in named if fnmatchcase(name, pattern)]
        if not matched:
            some = ", ".join(list(named)[:6])
            raise InputError(f"student.frozen {pattern!r} matches no parameter of the student; its names are {some}, …")
        frozen.update(matched)
    if len(frozen) == len(named):
        raise InputError(f"student.frozen {', '.join(patterns)} leaves nothing to train; name fewer modules")
    for name in frozen:
        named[name].requires_grad_(False)
    return sum(named[name].numel() for name in frozen)


@dataclass(frozen=True)
class Anatomy:
    """What a short forward pass tells of a model."""

    head_path: HeadPath
    widths: Mapping[str, int]  # asked student layer → width of its output


def examine(model: Any, layers: list[str], zero_stage: int) -> Anatomy:
    """Run a few tokens through a model to learn its layers' widths and whether its logits are head(last state).

    Raises:
        InputError: the student has no module of an asked name.
    """
    names = dict(model.named_modules())
    missing = [layer for layer in layers if layer != "final" and layer not in names]
    if missing:
        shown = [name for name in names if name and name.count(".") <= 2][:24]
        raise InputError(
            f"the student has no layer {missing[0]!r}; train.loss.hidden_map may name `final` or a module such as "
            f"{', '.join(shown)}"
        )
    ids = torch.arange(_PROBE_TOKENS)[None]
    was_training = model.training
    model.eval()
    head = model.get_output_embeddings()
    with torch.no_grad(), record_layers(model, ["final", *layers]) as seen:
        state = model.base_model(input_ids=ids, use_cache=False)[0]
        logits = model(input_ids=ids, use_cache=False).logits
        plain = isinstance(head, nn.Linear) and torch.allclose(head(state), logits, rtol=1e-4, atol=1e-4)
    model.train(was_training)
    path: HeadPath = "model" if not plain else "module" if zero_stage == 3 else "fused"
    return Anatomy(path, {layer: int(seen[layer].shape[-1]) for layer in layers})


@contextmanager
def record_layers(model: Any, layers: list[str]) -> Iterator[dict[str, Tensor]]:
    """Collect the outputs of named modules while the context is open; `final` is the input of the output head."""
    seen: dict[str, Tensor] = {}

    def watch(layer: str) -> Any:
        def keep(_module: nn.Module, inputs: tuple[Tensor, ...], output: Any) -> None:
            value = inputs[0] if layer == "final" else output
            seen[layer] = value[0] if isinstance(value, tuple) else value

        module = model.get_output_embeddings() if layer == "final" else model.get_submodule(layer)
        return module.register_forward_hook(keep)

    handles = [watch(layer) for layer in dict.fromkeys(layers)]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


class DistilModel(nn.Module):
    """The student, its projectors, and the loss; what DeepSpeed trains."""

    def __init__(
        self,
        model: Any,
        loss: LossConfig,
        head_path: HeadPath,
        transfer: HiddenTransfer | None,
        hidden_weight: float = 1.0,
        teacher_head: Head | None = None,
    ) -> None:
        """Put together what is trained, with the weights of the first step.

        Args:
            model: the student.
            loss: terms and weights.
            head_path: how logits come about.
            transfer: projectors of hidden states, where there are any.
            hidden_weight: how many positions each kept hidden state stands for.
            teacher_head: the teacher's, where whole distributions are compared.
        """
        super().__init__()
        self._hidden_weight = hidden_weight
        self.model = model
        self.transfer = transfer
        self.head_path: HeadPath = head_path
        self._loss = loss
        self._layers = list(loss.hidden_map.values()) if transfer is not None else []
        self._teacher_head = teacher_head
        self._divergence = chosen_divergence(loss) if loss.distils else None
        self.balance = Balance([float(w) for w in self._fixed(0, 1)]) if loss.adaptive == "uncertainty" else None
        self.at_step(0, 1)

    def at_step(self, step: int, steps: int) -> None:
        """Set weights and temperature to those of step 0, 1, … of a run of `steps`; learned weights stay."""
        self._weights = self._fixed(step, steps)
        self._temperature = value_at(self._loss.temperature, step, steps)

    def weights(self) -> dict[str, float]:
        """Return the weight of each term, by its name in the config."""
        return dict(zip(TERMS, self._weights, strict=True))

    def _fixed(self, step: int, steps: int) -> list[float]:
        return [value_at(getattr(self._loss, term), step, steps) for term in TERMS]

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the loss summed over the batch's supervised positions, and its terms for the log.

        Returns:
            A float32 scalar to differentiate, and the detached sums [cross-entropy, divergence, hidden], unweighted.
        """
        learned: Tensor | None = None
        if self.balance is not None:
            learned = self.balance()
            self._weights = self.balance.weights(learned)
        with record_layers(self.model, self._layers) as seen:
            states = predictor_states(self.model, batch) if self.head_path != "model" else None
            total, each = self._head(batch, states)
        hidden = total.new_zeros(())
        if self.transfer is not None:
            student = {
                layer: states if name == "final" and states is not None else _rows(seen[name], batch.predictor)
                for layer, name in self._loss.hidden_map.items()
            }
            hidden = self.transfer(student, batch.hidden, batch.hidden_rows, self._hidden_weight)
            total = total + self._weights[2] * hidden
        divergence = each[1] if len(each) > 1 else each.new_zeros(())
        sums = torch.stack([each[0], divergence, hidden.detach()])
        if self.balance is not None and learned is not None:
            total = total + self.balance.rest(learned, sums, batch.num_supervised)
        return total, sums

    def _head(self, batch: Batch, states: Tensor | None) -> tuple[Tensor, Tensor]:
        hard, soft, _ = self._weights
        terms = HeadTerms(hard, [] if self._divergence is None else [(soft, self._divergence)], self._temperature)
        teacher = self._teacher(batch)
        if states is None:
            return logits_loss(predictor_logits(self.model, batch), batch.targets, terms, teacher)
        head = self.model.get_output_embeddings()
        if self.head_path == "module":
            return logits_loss(head(states), batch.targets, terms, teacher)
        return head_loss(states, head.weight, head.bias, batch.targets, terms, teacher)

    def _teacher(self, batch: Batch) -> FullTeacher | None:
        """Return whole distributions where the divergence asks for them."""
        if self._divergence is None:
            return None
        if self._loss.exact:
            return FullTeacher(states=batch.hidden[FINAL], head=self._teacher_head)
        return FullTeacher(dense=batch.targets) if self._loss.softened else None


def predictor_states(model: Any, batch: Batch) -> Tensor:
    """Return the input of the output head at the positions that predict supervised tokens, [P, width]."""
    return _rows(model.base_model(**_inputs(model, batch))[0], batch.predictor)


def predictor_logits(model: Any, batch: Batch) -> Tensor:
    """Return the model's logits at the positions that predict supervised tokens, [P, vocabulary]."""
    return _rows(model(**_inputs(model, batch)).logits, batch.predictor)


def _rows(values: Tensor, index: Tensor) -> Tensor:
    """Pick rows of [N, L, width] by flat index, [P] → [P, width]."""
    return values.reshape(-1, values.shape[-1]).index_select(0, index)


def _inputs(model: Any, batch: Batch) -> dict[str, Any]:
    inputs: dict[str, Any] = {"input_ids": batch.input_ids, "use_cache": False}
    if batch.attention is not None:
        inputs["position_ids"] = batch.position_ids
        inputs["attention_mask"] = _mask(batch.attention, model)
    return inputs


def _mask(attention: Tensor, model: Any) -> Tensor:
    """Return the mask in the form that the model's attention adds or selects by, [N, 1, L, L]."""
    if model.config._attn_implementation == "sdpa":
        return attention
    dtype = next(model.parameters()).dtype
    return torch.zeros(attention.shape, dtype=dtype, device=attention.device).masked_fill(
        ~attention, torch.finfo(dtype).min
    )


def _local_folder(name: str) -> Path:
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder.absolute()
    if folder.is_absolute() or name.startswith((".", "~")):
        raise InputError(f"student.path {name} is no folder; give a model folder or a hub name")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.model"]))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise InputError(
            f"student.path {name} is neither a folder nor a model that the hub gives: {str(error).splitlines()[0]}"
        ) from error
