"""Divergences over one vocabulary, by name; which targets each one takes stands in `trainer.served`.

Those across tokenizers are in `trainer.losses.across`.
"""

from collections.abc import Callable

from trainer.loss_config import LossConfig
from trainer.losses.adaptive_kl import AdaptiveKL
from trainer.losses.forward_kl import ForwardKL
from trainer.losses.jsd import JSD
from trainer.losses.reverse_kl import ReverseKL
from trainer.losses.rows import Divergence
from trainer.losses.skew_kl import ReverseSkewKL, SkewKL
from trainer.losses.tvd import TVD

DIVERGENCES: dict[str, Callable[[LossConfig], Divergence]] = {
    "forward_kl": lambda loss: ForwardKL(loss.draw_weight),
    "reverse_kl": lambda loss: ReverseKL(),
    "jsd": lambda loss: JSD(loss.beta),
    "skew_kl": lambda loss: SkewKL(loss.skew),
    "reverse_skew_kl": lambda loss: ReverseSkewKL(loss.skew),
    "adaptive_kl": lambda loss: AdaptiveKL(),
    "tvd": lambda loss: TVD(),
}


def chosen_divergence(loss: LossConfig) -> Divergence:
    """Return the divergence that a config asks for."""
    return DIVERGENCES[loss.divergence](loss)
