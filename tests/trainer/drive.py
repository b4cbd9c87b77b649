"""A driver of one tiny training, to be killed by a test: `python -m tests.trainer.drive RUN_DIR ARGUMENTS`."""

import json
import pickle
import sys
from pathlib import Path
from typing import Any

from cluster.config import ClusterConfig
from cluster.ray_session import ray_session
from trainer.result import TrainResult


def train_here(arguments: dict[str, Any], on_event: Any) -> TrainResult:
    """Run `train_student` on a local Ray of its own."""
    from trainer.runner import train_student
    from trainer.spec import Training

    with ray_session(ClusterConfig(device="cpu"), arguments["train"].workers):
        return train_student(Training(**arguments), on_event)


def main() -> None:
    """Print each event as a line of JSON, and last the result."""
    arguments = pickle.loads(Path(sys.argv[1]).read_bytes())  # noqa: S301 - written by the test itself
    result = train_here(arguments, lambda event: print(json.dumps(event), flush=True))
    print(json.dumps({"event": "result", "result": result.to_json()}), flush=True)


if __name__ == "__main__":
    main()
