"""What a test runs where devices are those of a slice: what would keep a bundle from being loaded there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jaxserve.checkpoint.sources import spec_of
from jaxserve.core.config import ServeConfig
from jaxserve.launch.aot import abstract_replica
from jaxserve.launch.bundle import open_bundle
from jaxserve.launch.origin import Origin
from jaxserve.sharding.topology import answer, parse_topology


def differences(request: dict[str, Any]) -> dict[str, Any]:
    bundle = open_bundle(Path(request["bundle"]))
    config = bundle.adopt(ServeConfig(model=request["model"]))
    spec = spec_of(request["model"])
    replica, _ = abstract_replica(spec, config, parse_topology(request["topology"]))
    bundle.require(spec, replica.mesh)
    return {"differences": bundle.origin.differences(**vars(Origin.of(replica, config)))}


if __name__ == "__main__":
    answer(differences)
