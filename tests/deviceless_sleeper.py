"""What a test leaves alone: says that it has its request, and sleeps instead of answering."""

from __future__ import annotations

import time
from typing import Any

from jaxserve.sharding.topology import answer, reply


def sleep(request: dict[str, Any]) -> dict[str, Any]:
    reply({"asked": request})
    time.sleep(60)
    return {}


if __name__ == "__main__":
    answer(sleep)
