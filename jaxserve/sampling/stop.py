"""Stop strings in a stream of text, found wherever the borders between its pieces fall.

For each stop string the matcher keeps how many of its characters the text so far ends with (the state of a
Knuth-Morris-Pratt automaton). The longest of these is the text that could still become a stop string; it is held back
and everything before it is let go. The first character that completes a stop string ends the sequence; of several
stop strings completed by the same character the one that starts first wins. So the result does not depend on how the
text was cut into pieces.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class StopResult:
    """What a piece of text lets go.

    Attributes:
        text: Text that cannot become part of a stop string any more; without the stop string unless it is to be kept.
        stop: The stop string that ended the sequence, if one did.
    """

    text: str
    stop: str | None


class _Automaton:
    """Counts how many characters of one string the text ends with."""

    __slots__ = ("failure", "matched", "target")

    def __init__(self, target: str) -> None:
        self.target = target
        self.matched = 0
        # failure[i]: length of the longest proper prefix of target[:i] that is also its suffix
        self.failure = [0] * (len(target) + 1)
        length = 0
        for i in range(1, len(target)):
            while length and target[i] != target[length]:
                length = self.failure[length]
            length += target[i] == target[length]
            self.failure[i + 1] = length

    def step(self, char: str) -> bool:
        """Takes one character and says whether the whole string now ends the text."""
        if self.matched == len(self.target):
            self.matched = self.failure[self.matched]
        while self.matched and self.target[self.matched] != char:
            self.matched = self.failure[self.matched]
        self.matched += self.target[self.matched] == char
        return self.matched == len(self.target)


class StopMatcher:
    """Looks for stop strings in the text of one sequence.

    Args:
        stops: Non-empty strings.
        include: Keep the stop string in the text.
    """

    def __init__(self, stops: Sequence[str], *, include: bool = False) -> None:
        # Longest first: of those completed by the same character the longest starts first.
        self._automata = [_Automaton(stop) for stop in sorted(set(stops), key=len, reverse=True)]
        self._include = include
        self._held = ""

    def push(self, text: str, *, can_stop: bool = True) -> StopResult:
        """Takes the next piece of text.

        Args:
            text: New characters.
            can_stop: False while no stop string may end here yet (min_tokens); one that began here may still end later.
        """
        if not self._automata:
            return StopResult(text=text, stop=None)
        buffer = self._held + text
        for end, char in enumerate(text, start=len(self._held) + 1):
            found = [automaton for automaton in self._automata if automaton.step(char)]
            if found and can_stop:
                stop = found[0].target
                self._held = ""
                return StopResult(text=buffer[: end if self._include else end - len(stop)], stop=stop)
        # A whole stop string that was not allowed to end here can only become one again from its longest border on.
        num_held = max(
            automaton.failure[automaton.matched] if automaton.matched == len(automaton.target) else automaton.matched
            for automaton in self._automata
        )
        border = len(buffer) - num_held
        self._held = buffer[border:]
        return StopResult(text=buffer[:border], stop=None)

    def flush(self) -> str:
        """Returns the text held back, when the sequence ends for another reason."""
        text, self._held = self._held, ""
        return text
