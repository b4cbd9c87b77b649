"""Ray's fake nodes, each with a folder of its own for what a job ships.

Nodes of one machine share their session's folder, and in it the unpacked working directory. A node that joins unpacks
it anew: it removes the folder in which the driver and the ranks of other nodes are at work. A process whose working
directory is gone cannot load MKL, and so dies in its first matrix product. Nodes on machines of their own are safe.
"""

from typing import Any

from ray._private import ray_constants
from ray.autoscaler._private.fake_multi_node.node_provider import FakeMultiNodeProvider


class ApartNodeProvider(FakeMultiNodeProvider):  # type: ignore[misc]
    """The fake provider of Ray's autoscaler, with nodes as far apart as on machines of their own."""

    def _create_node_with_resources_and_labels(self, *arguments: Any) -> None:
        with self.lock:
            ray_constants.DEFAULT_RUNTIME_ENV_DIR_NAME = f"runtime_resources_{self._next_node_id + 1}"
            super()._create_node_with_resources_and_labels(*arguments)
