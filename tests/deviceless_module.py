"""What `run_deviceless` runs in its tests: counts the devices of a topology."""

from __future__ import annotations

from typing import Any

from jaxserve.sharding.topology import abstract_devices, answer, parse_topology, reply


def count(request: dict[str, Any]) -> dict[str, Any]:
    reply({"progress": 1})
    devices = abstract_devices(parse_topology(request["topology"]))
    return {"devices": len(devices), "kind": devices[0].device_kind}


if __name__ == "__main__":
    answer(count)
