"""Ropes that depend on the length are told the longest sequence served, whatever the step's own lengths are."""

from __future__ import annotations

from dataclasses import replace

from tiny_engine import CONFIG, SPEC

from jaxserve.engine.programs import programs
from jaxserve.launch.build import plan_replica
from jaxserve.models.spec import DynamicRopeScaling, RopeScaling, RopeSpec
from jaxserve.sharding.mesh import make_mesh


def decoder_of(theta: float, scaling: RopeScaling | None) -> str:
    """The decoder of one token a step, as XLA is given it."""
    spec = replace(SPEC, rope=RopeSpec(theta=theta, scaling=scaling))
    replica, resolved = plan_replica(CONFIG, spec, make_mesh())
    assert resolved.max_model_len == 128
    smallest = min((each for each in programs(replica) if each.key[0] == "decode"), key=lambda each: each.key)
    return smallest.lower().as_text()


def test_programs_know_the_longest_sequence() -> None:
    dynamic = DynamicRopeScaling(factor=4.0, original_max_len=32)
    theta = 10000.0 * (4.0 * 128 / 32 - 3.0) ** (16 / 14)
    assert decoder_of(10000.0, dynamic) == decoder_of(theta, None) != decoder_of(10000.0, None)
