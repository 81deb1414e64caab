"""The device mesh: three axes, always all present, so that one code path serves one chip and a slice.

`data` splits sequences between replicas, `expert` splits experts, `tensor` splits heads, ffn and vocabulary. An axis
of size 1 costs nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh

from jaxserve.core.errors import ConfigError

DATA = "data"
EXPERT = "expert"
TENSOR = "tensor"
AXES = (DATA, EXPERT, TENSOR)


def make_mesh(*, data: int = 1, expert: int = 1, tensor: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Lays devices out as `[data, expert, tensor]`; neighbours in `tensor` are neighbours in the device list.

    Args:
        data: Replicas of the model that split the sequences.
        expert: Shards of the experts.
        tensor: Shards of heads, ffn and vocabulary.
        devices: Devices to use, the first `data * expert * tensor` of them; all visible ones by default.

    Raises:
        ConfigError: Fewer devices are visible than the mesh needs.
    """
    available = list(devices) if devices is not None else jax.devices()
    needed = data * expert * tensor
    if len(available) < needed:
        raise ConfigError(
            f"The mesh data={data},expert={expert},tensor={tensor} needs {needed} devices and {len(available)} are "
            "visible; ask for a smaller mesh or start on more devices.",
            param="mesh",
        )
    grid = np.array(available[:needed]).reshape(data, expert, tensor)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def abstract_mesh(*, data: int = 1, expert: int = 1, tensor: int = 1) -> AbstractMesh:
    """A mesh without devices, for shapes and counts."""
    return AbstractMesh((data, expert, tensor), AXES, axis_types=(AxisType.Auto,) * len(AXES))
