"""Who runs when, and for how long: rounds whose order changes, within a budget."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

FEWEST_ROUNDS = 3
CALLS_PER_TURN = 2  # at least: one that warms the caches again, one that is timed
# In shorter turns, who runs much code per call mostly finds caches cold. Rather fewer rounds, but as many as an
# interval by order statistics takes.
TURN_SECONDS, ENOUGH_ROUNDS = 0.1, 6

_Item = TypeVar("_Item")


def plan_rounds(call_seconds: Sequence[float], budget: float, rounds: int) -> tuple[int, float]:
    """How many rounds fit into `budget` seconds, and how long one turn of one competitor takes in each.

    call_seconds: of one call in each turn of a round. rounds: at most. A slow competitor takes its CALLS_PER_TURN calls
    however long they last; the others share what that leaves evenly. Where not even FEWEST_ROUNDS rounds of these fit,
    they run all the same and the budget is exceeded. Turns of less than TURN_SECONDS each are avoided, down to
    ENOUGH_ROUNDS rounds.
    """
    least = sorted(CALLS_PER_TURN * seconds for seconds in call_seconds)
    long_enough = sum(max(seconds, TURN_SECONDS) for seconds in least)
    most = min(rounds, max(ENOUGH_ROUNDS, int(budget / long_enough)))
    count = max(FEWEST_ROUNDS, min(most, int(budget / max(sum(least), 1e-9))))
    left = budget / count
    for index in range(len(least) - 1, -1, -1):  # those that need more than an even share, slowest first
        share = left / (index + 1)
        if least[index] <= share:
            return count, share
        left -= least[index]
    return count, 0.0


def order_of(items: Sequence[_Item], number: int) -> list[_Item]:
    """The order of round `number`, from 0: each round begins with another one, and every second one runs backwards, so
    that nobody always follows the same one."""
    turn = (number // 2) % max(len(items), 1)
    turned = [*items[turn:], *items[:turn]]
    return turned[::-1] if number % 2 else turned
