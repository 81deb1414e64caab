"""jaxserve: a JAX-first serving stack for large language models.

`LLM` and `SamplingParams` are the offline API; they are imported when first used, so that host-only parts need no JAX.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jaxserve.core.types import SamplingParams
    from jaxserve.launch.llm import LLM

__all__ = ["LLM", "SamplingParams"]


def __getattr__(name: str) -> object:
    """Imports what `__all__` names."""
    match name:
        case "LLM":
            from jaxserve.launch.llm import LLM

            return LLM
        case "SamplingParams":
            from jaxserve.core.types import SamplingParams

            return SamplingParams
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
