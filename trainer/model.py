"""The student with its projectors and its loss: the module that turns a batch into what DeepSpeed minimises."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from storage.classes import padded_with
from storage.heads import FINAL, Head
from trainer.anatomy import HeadPath, record_attention, record_layers
from trainer.batches import Batch
from trainer.loss_config import LossConfig
from trainer.losses import FullTeacher, HeadTerms, chosen_divergence, class_loss, head_loss, logits_loss
from trainer.losses.attention import attention_distance
from trainer.losses.balance import Balance
from trainer.losses.hidden import HiddenTransfer
from trainer.schedules import value_at

if TYPE_CHECKING:
    from trainer.ewc import Anchor

TERMS = ("ce", "kl", "hidden")
"""Terms of every loss, by the names of their weights in the config; `attention` joins them where it is asked for."""


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
        anchor: "Anchor | None" = None,
    ) -> None:
        """Put together what is trained, with the weights of the first step.

        Args:
            model: the student.
            loss: terms and weights.
            head_path: how logits come about.
            transfer: projectors of hidden states, where there are any.
            hidden_weight: how many positions each kept hidden state stands for.
            teacher_head: the teacher's, where whole distributions are compared.
            anchor: what holds on to earlier weights.
        """
        super().__init__()
        self._hidden_weight = hidden_weight
        self.model = model
        self.transfer = transfer
        self.head_path: HeadPath = head_path
        self._loss = loss
        self._layers = list(loss.hidden_map.values()) if transfer is not None else []
        self._teacher_head = teacher_head
        self._anchor = anchor
        self._weighted = (*TERMS, "attention") if loss.attends else TERMS
        self.terms = (*self._weighted, "ewc") if anchor is not None else self._weighted
        """Names of the terms that `forward` tells."""
        self._maps = dict(loss.attention_map) if loss.attends else {}
        self._divergence = chosen_divergence(loss) if loss.distils else None
        self.balance = Balance([float(w) for w in self._fixed(0, 1)]) if loss.adaptive == "uncertainty" else None
        self.at_step(0, 1)

    def at_step(self, step: int, steps: int) -> None:
        """Set weights and temperature to those of step 0, 1, … of a run of `steps`; learned weights stay."""
        self._weights = self._fixed(step, steps)
        self._temperature = value_at(self._loss.temperature, step, steps)

    def weights(self) -> dict[str, float]:
        """Return the weight of each term, by its name in the config."""
        return dict(zip(self._weighted, self._weights, strict=True))

    def _fixed(self, step: int, steps: int) -> list[float]:
        return [value_at(getattr(self._loss, term), step, steps) for term in self._weighted]

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the loss summed over the batch's supervised positions, and its terms for the log.

        Returns:
            A float32 scalar to differentiate, and the detached sums of `terms`, unweighted.
        """
        learned: Tensor | None = None
        if self.balance is not None:
            learned = self.balance()
            self._weights = self.balance.weights(learned)
        with (
            record_layers(self.model, self._layers) as seen,
            record_attention(self.model, list(self._maps.values())) as maps,
        ):
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
        parts = [each[0], divergence, hidden.detach()]
        if self._maps and batch.map_count is not None:
            looked = {layer: maps[name] for layer, name in self._maps.items()}
            distance = attention_distance(looked, batch.maps, batch.predictor, batch.map_count, self._hidden_weight)
            total, parts = total + self._weights[3] * distance, [*parts, distance.detach()]
        sums = torch.stack(parts)
        if self.balance is not None and learned is not None:
            total = total + self.balance.rest(learned, sums, batch.num_supervised)
        if self._anchor is not None:
            # The loss is divided by the supervised tokens of the whole step: all its batches together add it once.
            penalty = self._anchor.penalty(self.model) * batch.num_supervised
            total, sums = total + penalty, torch.cat([sums, penalty.detach()[None]])
        return total, sums

    def _head(self, batch: Batch, states: Tensor | None) -> tuple[Tensor, Tensor]:
        hard, soft, *_ = self._weights
        terms = HeadTerms(hard, [] if self._divergence is None else [(soft, self._divergence)], self._temperature)
        teacher = self._teacher(batch)
        if states is None:
            of_logits = logits_loss if batch.classifier is None else class_loss
            return of_logits(predictor_logits(self.model, batch), batch.targets, terms, teacher)
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
    """Return the model's logits at the positions that predict supervised tokens, [P, vocabulary].

    Of a classifier: its logits of the classes at the supervised positions, [P, classes].
    """
    inputs = batch.classifier
    if inputs is not None:
        with padded_with(model, inputs.pad_id):
            output = model(input_ids=inputs.input_ids, attention_mask=inputs.attention_mask)
        return _rows(output.logits, batch.predictor)
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
