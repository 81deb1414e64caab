"""The virtual token counter by itself."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest

from jaxserve.core.errors import ConfigError
from jaxserve.engine.fairness import FairnessConfig, VirtualTokenCounter


class Clock:
    def __init__(self) -> None:
        self.now = 1e6

    def __call__(self) -> float:
        return self.now


def counters(**config: Any) -> tuple[VirtualTokenCounter, Clock]:
    clock = Clock()
    return VirtualTokenCounter(FairnessConfig(**config), clock), clock


def test_service_is_weighed_and_divided_by_the_share() -> None:
    fair, _ = counters(shares={"b": 4.0})
    a, b = fair.open("a"), fair.open("b")
    for account in (a, b):
        fair.charge_input(account, 100)
        account.output_tokens += 10
    assert (fair.counter(a), fair.counter(b)) == (120.0, 30.0)
    assert (a.output_tokens, fair.counter(a)) == (0, 120.0)


def test_lift_gives_no_credit_and_takes_none() -> None:
    fair, _ = counters()
    a = fair.open("a")
    fair.charge_input(a, 50)
    fair.lift(a, 20.0)
    assert fair.counter(a) == 50
    fair.lift(a, 80.0)
    assert fair.counter(a) == 80


@pytest.mark.parametrize("half_life_s", [10.0, 1e5])
def test_half_life_lets_old_service_count_less(half_life_s: float) -> None:
    fair, clock = counters(half_life_s=half_life_s)
    early, late, other = fair.open("early"), fair.open("late"), fair.open("other")
    assert fair.counter(early) == fair.zero == -math.inf
    fair.charge_input(early, 1000)
    clock.now += 3 * half_life_s
    # 1000 tokens three half-lives ago are 125 of now.
    fair.charge_input(late, 124)
    fair.charge_input(other, 126)
    assert fair.counter(late) < fair.counter(early) < fair.counter(other)
    for _ in range(1000):
        clock.now += half_life_s
        fair.charge_input(early, 100)
    # A geometric series: in the long run 100 each half-life are twice as much.
    fair.charge_input(late, 199)
    assert fair.counter(late) < fair.counter(early)
    fair.charge_input(late, 2)
    assert fair.counter(early) < fair.counter(late)


def test_whoever_could_not_be_told_from_a_new_client_is_forgotten() -> None:
    fair, _ = counters()
    stays = fair.open("stays", 2)
    ahead, behind = fair.open("ahead"), fair.open("behind")
    fair.charge_input(stays, 100)
    fair.charge_input(ahead, 150)
    fair.charge_input(behind, 90)
    level = [100.0]
    fair.close(behind, lambda: level[0])
    fair.close(ahead, lambda: level[0])
    assert fair.find("behind") is None
    assert fair.find("ahead") is ahead, "its debt would be forgiven"
    fair.check_integrity()
    level[0] = 150.0
    fair.close(stays, lambda: level[0])
    assert fair.num_accounts == 2
    fair.close(stays, lambda: level[0])
    assert fair.num_accounts == 0


def test_idle_clients_are_bounded() -> None:
    fair, _ = counters(max_idle=10)
    for number in range(1000):
        account = fair.open(f"c{number}")
        fair.charge_input(account, 5)
        fair.close(account, lambda: 0.0)
        fair.check_integrity()
    assert fair.num_accounts == 10
    assert fair.find("c999") is not None


def test_a_client_that_comes_back_keeps_its_account() -> None:
    fair, _ = counters()
    account = fair.open("a", 3)
    fair.charge_input(account, 5)
    for _ in range(3):
        fair.close(account, lambda: 0.0)
    assert fair.open("a") is account
    assert account.num_live == 1
    fair.check_integrity()


@pytest.mark.parametrize(
    "config",
    [{"input_weight": 0.0}, {"output_weight": -1.0}, {"shares": {"a": 0.0}}, {"shares": {"a": math.inf}},
     {"half_life_s": -1.0}, {"half_life_s": math.inf}, {"max_idle": -1}],
)  # fmt: skip
def test_senseless_settings_are_refused(config: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        FairnessConfig(**config)


def test_many_clients_that_come_once_leave_nothing_behind() -> None:
    """Each lifts the level for the next, as a queue does that is empty in between."""
    fair, _ = counters()
    level = 0.0
    previous = None
    for number in itertools.count():
        account = fair.open(f"c{number}")
        fair.lift(account, level)
        fair.charge_input(account, 7)
        level = fair.counter(account)
        if previous is not None:
            fair.close(previous, lambda level=level: level)
        previous = account
        if number == 5000:
            break
    assert fair.num_accounts == 1
