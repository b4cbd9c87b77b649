"""Stored hidden states as tensors."""

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor


def states_tensor(states: NDArray[Any]) -> "Tensor":
    """Return stored states [P, width] as a float tensor; 16-bit integers are bfloat16 bit patterns."""
    import torch

    array = np.ascontiguousarray(states)
    if array.dtype == np.uint16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)
