"""What `run_deviceless` runs in its tests: counts the devices of a topology."""

import json
import sys

from jaxserve.sharding.topology import abstract_devices, parse_topology, reply

if __name__ == "__main__":
    request = json.load(sys.stdin)
    reply({"progress": 1})
    devices = abstract_devices(parse_topology(request["topology"]))
    reply({"devices": len(devices), "platform": devices[0].platform})
