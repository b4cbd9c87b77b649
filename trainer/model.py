"""The student with its projectors and its loss: the module that turns a batch into what DeepSpeed minimises."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from storage.classes import padded_with
from storage.heads import FINAL, Head
from trainer.anatomy import HeadPath, record_attention, record_layers
from trainer.batches import Batch, position_groups
from trainer.engine import whole_weights
from trainer.loss_config import LossConfig
from trainer.losses import FullTeacher, HeadTerms, chosen_divergence, class_loss, head_loss, logits_loss
from trainer.losses.across import AcrossTerms, across_loss
from trainer.losses.attention import attention_distance
from trainer.losses.balance import Balance, GradientBalance, squared_gradient
from trainer.losses.hidden import HiddenTransfer
from trainer.losses.relation import relation_distance
from trainer.schedules import value_at

if TYPE_CHECKING:
    from trainer.ewc import Anchor

TERMS = ("ce", "kl", "hidden")
"""Terms of every loss, by the names of their weights in the config; others join them where they are asked for."""


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
        self._teacher_head = teacher_head
        self._anchor = anchor
        beside = {"attention": loss.attends, "relation": loss.relates}
        self._weighted = (*TERMS, *(name for name, is_asked in beside.items() if is_asked))
        self._divergence = chosen_divergence(loss) if loss.distils and not loss.crosses else None
        self.balance = Balance([float(w) for w in self._fixed(0, 1)]) if loss.adaptive == "uncertainty" else None
        self.gradients: GradientBalance | None = None
        if loss.adaptive == "gradient":
            self.gradients = GradientBalance(self._weighted, loss.adaptive_every)
        measured = () if self.gradients is None else self.gradients.names
        self.terms = (*self._weighted, *measured, *(("ewc",) if anchor is not None else ()))
        """Names of the terms that `forward` tells."""
        self.at_step(0, 1)

    def at_step(self, step: int, steps: int) -> None:
        """Set weights and temperature to those of step 0, 1, … of a run of `steps`; learned weights stay."""
        self._weights = self._fixed(step, steps)
        self._temperature = value_at(self._loss.temperature, step, steps)
        self._measures = self.gradients is not None and self.gradients.is_due(step)
        if self.gradients is not None:
            self._weights = self.gradients.weights(self._weights)

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
        maps_of = self._loss.attention_map if self._loss.attends else {}
        wanted = [layer for layer in self._loss.student_layers if layer != FINAL or self.head_path == "model"]
        with record_layers(self.model, wanted) as seen, record_attention(self.model, list(maps_of.values())) as maps:
            fused = self.head_path != "model"
            scored = (predictor_states if fused else predictor_logits)(self.model, batch)
        total, each = self._head(scored, batch, self._weights[0], self._weights[1] if self._loss.distils else None)
        sums = {"ce": each[0], "kl": each[1] if len(each) > 1 else each.new_zeros(())}
        states = {layer: _rows(tensor, batch.predictor) for layer, tensor in seen.items()}
        if fused:
            states[FINAL] = scored
        looked = {layer: maps[name] for layer, name in maps_of.items()}
        extra = self._on_states(states, batch)
        if looked and batch.map_count is not None:
            extra["attention"] = attention_distance(
                looked, batch.maps, batch.predictor, batch.map_count, self._hidden_weight
            )
        for name, value in extra.items():
            total = total + self._weights[self._weighted.index(name)] * value
            sums[name] = value.detach()
        told = torch.stack([sums.get(name, total.new_zeros(())) for name in self._weighted])
        if self.balance is not None and learned is not None:
            total = total + self.balance.rest(learned, told, batch.num_supervised)
        if self.gradients is not None:
            told = torch.cat([told, self._gradients(scored, states, batch)])
        if self._anchor is not None:
            # The loss is divided by the supervised tokens of the whole step: all its batches together add it once.
            penalty = self._anchor.penalty(self.model) * batch.num_supervised
            total, told = total + penalty, torch.cat([told, penalty.detach()[None]])
        return total, told

    def _on_states(self, states: Mapping[str, Tensor], batch: Batch) -> dict[str, Tensor]:
        """Return the terms on hidden states, from the student's states of each layer at the P positions."""
        found: dict[str, Tensor] = {}
        loss, rows, weight = self._loss, batch.hidden_rows, self._hidden_weight
        if self.transfer is not None:
            mine = {layer: states[name] for layer, name in loss.hidden_map.items()}
            found["hidden"] = self.transfer(mine, batch.hidden, rows, weight)
        if loss.relates:
            mine = {layer: states[name] for layer, name in loss.relation_map.items()}
            found["relation"] = relation_distance(
                mine, batch.hidden, loss.relation_heads, position_groups(batch), rows, weight
            )
        return found

    def _gradients(self, scored: Tensor, states: Mapping[str, Tensor], batch: Batch) -> Tensor:
        """Return the squared gradient of each term on what it is made of, summed over positions; 0 if not now."""
        found = scored.new_zeros(len(self._weighted), dtype=torch.float32)
        if not (self._measures and self.training):
            return found
        alone = {"ce": (1.0, None), "kl": (0.0, 1.0)}
        with whole_weights(self.model.get_output_embeddings(), self.head_path == "module"):
            for n, name in enumerate(self._weighted):
                if not self._weights[n]:
                    continue
                if name in alone:

                    def head(leaf: Mapping[str, Tensor], weights: tuple[float, float | None] = alone[name]) -> Tensor:
                        return self._head(leaf[FINAL], batch, *weights, whole=True)[0]

                    found[n] = squared_gradient(head, {FINAL: scored})
                else:

                    def term(leaf: Mapping[str, Tensor], name: str = name) -> Tensor:
                        return self._on_states(leaf, batch)[name]

                    # Where one position in w keeps states, its gradient stands for w of them, each a w-th as long.
                    found[n] = squared_gradient(term, states) / self._hidden_weight
        return found

    def _head(
        self, scored: Tensor, batch: Batch, hard: float, soft: float | None, whole: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Return the terms at the output head, from the states [P, width] that it takes, or from logits [P, V].

        Args:
            scored: states or logits, as `head_path` says.
            batch: what they are of.
            hard: weight of cross-entropy.
            soft: weight of the divergence; none leaves it out.
            whole: the head's weights are whole and get no gradient.
        """
        pair: tuple[Tensor, Tensor | None] | None = None
        if self.head_path != "model":
            head = self.model.get_output_embeddings()
            if whole:
                pair = (head.weight.detach(), None if head.bias is None else head.bias.detach())
            elif self.head_path == "fused":
                pair = (head.weight, head.bias)
            else:
                scored = head(scored)
        teacher = None if soft is None else self._teacher(batch)
        if self._loss.crosses and soft is not None and batch.across is not None:
            across = AcrossTerms(hard, soft, "alm" if self._loss.divergence == "alm" else "uld", self._loss.alm_tau)
            return across_loss(scored, pair, batch.targets.label, batch.across, across, teacher)
        divergences = [] if self._divergence is None or soft is None else [(soft, self._divergence)]
        terms = HeadTerms(hard, divergences, self._temperature)
        if pair is not None:
            return head_loss(scored, *pair, batch.targets, terms, teacher)
        of_logits = logits_loss if batch.classifier is None else class_loss
        return of_logits(scored, batch.targets, terms, teacher)

    def _teacher(self, batch: Batch) -> FullTeacher | None:
        """Return whole distributions where the divergence asks for them."""
        if not self._loss.distils:
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
