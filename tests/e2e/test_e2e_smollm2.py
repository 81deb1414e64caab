"""The demo model through the real engine: the goldens of `transformers`, and the same tokens however it is scheduled."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
from smollm2_engine import smollm2
from tiny_engine import check_books, generate_all, start_like, tokens_by_index

from jaxserve.core.types import Request, SamplingParams

GOLDEN = Path(__file__).parents[1] / "goldens" / "smollm2.npz"
