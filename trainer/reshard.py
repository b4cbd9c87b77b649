"""A checkpoint made by one number of ranks, brought into the form that any number of them can load.

DeepSpeed's partitions of optimizer states fit the number of ranks that wrote them. Its universal form has one file per
parameter and state instead; an engine that was started with `load_universal` takes its own part of each.
"""

import argparse
import contextlib
import io
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from storage.errors import IntegrityError
from trainer.collective import everyones, together
from trainer.engine import Place


def is_partitioned(state: Path) -> bool:
    """Tell whether a saved DeepSpeed state is bound to its number of ranks; whole ones load anywhere as they are."""
    return any(state.glob("*_optim_states.pt"))


def make_universal(state: Path, target: Path) -> None:
    """Write the universal form of a saved state; IntegrityError when it cannot be read."""
    from deepspeed.checkpoint import ds_to_universal

    arguments = argparse.Namespace(
        input_folder=str(state),
        output_folder=str(target),
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,
    )
    target.mkdir(parents=True, exist_ok=True)
    try:
        # It prints its progress.
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            ds_to_universal.main(arguments)
    except (OSError, EOFError, KeyError, RuntimeError, ValueError) as error:
        raise IntegrityError(
            f"checkpoint {state} cannot be converted for another number of ranks ({error}); delete it to resume from "
            "the one before, or go back to as many train.workers as wrote it"
        ) from error


@contextlib.contextmanager
def universal_folder(folder: Path, tag: str, place: Place) -> Iterator[Path]:
    """Give a folder with the universal form of `folder/tag` under the same tag, made once per node. Collective.

    Ranks of one node stand side by side, as Ray Train and torchrun number them.
    """
    with contextlib.ExitStack() as stack:
        mine = None
        with together():
            if place.local_rank == 0:
                mine = stack.enter_context(tempfile.TemporaryDirectory(prefix="lectern-universal-"))
                make_universal(folder / tag, Path(mine) / tag)
        made = everyones(mine)[place.rank - place.local_rank]
        yield Path(made)
        everyones(None)  # nobody reads it any more


def group_settings(engine: Any) -> list[dict[str, Any]]:
    """Return the settings of each of the optimizer's parameter groups."""
    return [
        {name: value for name, value in group.items() if name != "params"}
        for group in engine.basic_optimizer.param_groups
    ]


def mend_optimizer(engine: Any, settings: list[dict[str, Any]]) -> None:
    """Undo what loading the universal form under ZeRO 3 does beside.

    It gives all groups the settings of the first, weight decay among them, and all parameters one step counter, which
    each of them then counts on.
    """
    optimizer = engine.basic_optimizer
    for group, own in zip(optimizer.param_groups, settings, strict=True):
        group.update(own)
    for state in optimizer.state.values():
        if isinstance(state.get("step"), torch.Tensor):
            state["step"] = state["step"].clone()
