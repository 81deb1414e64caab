"""Stop strings in a stream of text, found wherever the borders between its pieces fall.

`StopTable` is the Aho-Corasick automaton of all stop strings of a request. A state stands for the longest end of the
text that begins a stop string:

    stop strings "abc", "bd":    text ...xab    state "ab", whose failure is "b"
                                 text ...xabd   no stop string begins "abd": by the failure to "bd", which is one

The end of the text that could still become a stop string is held back and everything before it is let go. The first
character that completes a stop string ends the sequence; of several stop strings completed by the same character the
one that starts first wins. So the result does not depend on how the text was cut into pieces.

The sequences of a request share one table. States are made when a text first reaches them: to make the table costs a
sort of the strings, a character of text a look-up or two, and all states together are as many as the strings have
characters.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterable
from dataclasses import dataclass

_ROOT = 0
_NO_STOP = -1
_NUM_CODE_POINTS = 0x110000


@dataclass(frozen=True, kw_only=True, slots=True)
class StopResult:
    """What a piece of text lets go.

    Attributes:
        text: Text that cannot become part of a stop string any more; without the stop string unless it is to be kept.
        stop: The stop string that ended the sequence, if one did.
    """

    text: str
    stop: str | None


class StopTable:
    """The automaton of some stop strings; holds nothing of any text, so that many texts can go through it.

    A state is a number; 0 is the start. In the sorted list of strings, those that begin with a state's text are next to
    each other.

    Args:
        stops: Non-empty strings.
    """

    __slots__ = ("_depth", "_edges", "_failure", "_first", "_high", "_low", "_num_held", "_stop", "_strings")

    def __init__(self, stops: Iterable[str]) -> None:
        self._strings = sorted(set(stops))
        self._first = frozenset(string[0] for string in self._strings)
        self._edges: dict[int, int] = {}
        # One entry a state. Strings [low, high) begin with its text of `depth` characters.
        self._low = array("i", [0])
        self._high = array("i", [len(self._strings)])
        self._depth = array("i", [0])
        # The state of the longest proper end of its text that is a state.
        self._failure = array("i", [_ROOT])
        # Characters at the end of its text that could still become a stop string.
        self._num_held = array("i", [0])
        # The longest string that its text ends with.
        self._stop = array("i", [_NO_STOP])

    @property
    def num_states(self) -> int:
        """States made so far."""
        return len(self._depth)

    def passes(self, text: str) -> bool:
        """Whether no character of a text begins a stop string."""
        return self._first.isdisjoint(text)

    def step(self, state: int, char: str) -> int:
        """The state after one more character."""
        while True:
            if child := self._child(state, char):
                return child
            if state == _ROOT:
                return _ROOT
            state = self._failure[state]

    def stop(self, state: int) -> str | None:
        """The stop string that the text ends with; the longest, which starts first, of several."""
        found = self._stop[state]
        return None if found == _NO_STOP else self._strings[found]

    def num_held(self, state: int) -> int:
        """Characters at the end of the text that could still become a stop string."""
        return self._num_held[state]

    def _child(self, state: int, char: str) -> int:
        """The state of a state's text and one more character; 0 if no string begins so."""
        if state == _ROOT and char not in self._first:
            return _ROOT
        known = self._edges.get(state * _NUM_CODE_POINTS + ord(char))
        if known is not None:
            return known
        found = self._range(state, char)
        return _ROOT if found is None else self._grow(state, char, found)

    def _range(self, state: int, char: str) -> tuple[int, int] | None:
        """The strings that begin with a state's text and one more character."""
        low, high, depth = self._low[state], self._high[state], self._depth[state]
        # The one that is the state's text itself has no further character, and comes first.
        low += len(self._strings[low]) == depth
        low = bisect_left(self._strings, char, low, high, key=lambda string: string[depth])
        high = bisect_right(self._strings, char, low, high, key=lambda string: string[depth])
        return None if low == high else (low, high)

    def _grow(self, parent: int, char: str, found: tuple[int, int]) -> int:
        """Makes the state after one more character, and those that it needs as failures."""
        first = state = self._append(parent, char, found)
        made = [state]
        while parent != _ROOT:
            parent = self._failure[parent]
            known = self._edges.get(parent * _NUM_CODE_POINTS + ord(char))
            if known is not None:
                self._failure[state] = known
                break
            between = self._range(parent, char)
            if between is not None:
                self._failure[state] = state = self._append(parent, char, between)
                made.append(state)
        for state in reversed(made):
            failure, depth = self._failure[state], self._depth[state]
            low, high = self._low[state], self._high[state]
            self._stop[state] = low if len(self._strings[low]) == depth else self._stop[failure]
            # The last of them is the longest: what it has beyond the state's text may still come.
            self._num_held[state] = depth if len(self._strings[high - 1]) > depth else self._num_held[failure]
        return first

    def _append(self, parent: int, char: str, found: tuple[int, int]) -> int:
        state = self._edges[parent * _NUM_CODE_POINTS + ord(char)] = len(self._depth)
        self._low.append(found[0])
        self._high.append(found[1])
        self._depth.append(self._depth[parent] + 1)
        self._failure.append(_ROOT)
        self._num_held.append(0)
        self._stop.append(_NO_STOP)
        return state


class StopMatcher:
    """Looks for stop strings in the text of one sequence.

    Args:
        table: The stop strings; sequences may share it.
        include: Keep the stop string in the text.
    """

    __slots__ = ("_held", "_include", "_state", "_table")

    def __init__(self, table: StopTable, *, include: bool = False) -> None:
        self._table = table
        self._include = include
        self._state = _ROOT
        self._held = ""

    def push(self, text: str, *, can_stop: bool = True) -> StopResult:
        """Takes the next piece of text.

        Args:
            text: New characters.
            can_stop: False while no stop string may end here yet (min_tokens); one that began here may still end later.
        """
        table, state = self._table, self._state
        if state == _ROOT and table.passes(text):
            return StopResult(text=text, stop=None)
        buffer = self._held + text
        for end, char in enumerate(text, start=len(self._held) + 1):
            state = table.step(state, char)
            stop = table.stop(state) if can_stop else None
            if stop is not None:
                self._state, self._held = _ROOT, ""
                return StopResult(text=buffer[: end if self._include else end - len(stop)], stop=stop)
        self._state = state
        border = len(buffer) - table.num_held(state)
        self._held = buffer[border:]
        return StopResult(text=buffer[:border], stop=None)

    def flush(self) -> str:
        """Returns the text held back, when the sequence ends for another reason."""
        text, self._held, self._state = self._held, "", _ROOT
        return text
