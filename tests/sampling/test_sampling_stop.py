"""Stop strings against an oracle that looks at the whole text, character by character."""

from hypothesis import given
from hypothesis import strategies as st

from jaxserve.sampling.stop import StopMatcher, StopTable

TEXTS = st.text("abc", max_size=12)
STOPS = st.lists(st.text("abc", min_size=1, max_size=4), max_size=4)


def oracle(pieces: list[tuple[str, bool]], stops: list[str], include: bool) -> tuple[str, str | None]:
    """The text shown and the stop string found: the first to be complete, of those the one that starts first."""
    text = ""
    for piece, can_stop in pieces:
        for char in piece:
            text += char
            ending = [stop for stop in stops if text.endswith(stop)]
            if ending and can_stop:
                stop = max(ending, key=len)
                return (text if include else text.removesuffix(stop)), stop
    return text, None


def run(matcher: StopMatcher, pieces: list[tuple[str, bool]]) -> tuple[list[str], str | None]:
    shown: list[str] = []
    for piece, can_stop in pieces:
        result = matcher.push(piece, can_stop=can_stop)
        shown.append(result.text)
        if result.stop is not None:
            assert matcher.flush() == ""
            return shown, result.stop
    return [*shown, matcher.flush()], None


@given(st.lists(st.tuples(TEXTS, st.booleans()), max_size=8), STOPS, st.booleans())
def test_equal_to_the_oracle(pieces: list[tuple[str, bool]], stops: list[str], include: bool) -> None:
    shown, stop = run(StopMatcher(StopTable(stops), include=include), pieces)
    assert ("".join(shown), stop) == oracle(pieces, stops, include)


@given(TEXTS, STOPS, st.booleans(), st.integers(0, 3))
def test_cutting_the_text_changes_nothing(text: str, stops: list[str], include: bool, size: int) -> None:
    size += 1
    pieces = [(text[i : i + size], True) for i in range(0, len(text), size)]
    cut, cut_stop = run(StopMatcher(StopTable(stops), include=include), pieces)
    whole, whole_stop = run(StopMatcher(StopTable(stops), include=include), [(text, True)])
    assert ("".join(cut), cut_stop) == ("".join(whole), whole_stop)


@given(st.lists(TEXTS, max_size=6), STOPS)
def test_holds_back_no_more_than_could_be_a_stop_string(pieces: list[str], stops: list[str]) -> None:
    matcher = StopMatcher(StopTable(stops))
    text = shown = ""
    for piece in pieces:
        result = matcher.push(piece)
        if result.stop is not None:
            return
        text, shown = text + piece, shown + result.text
        held = text.removeprefix(shown)
        beginnings = {stop[:i] for stop in stops for i in range(len(stop))}
        longest = max((part for part in beginnings if text.endswith(part)), key=len, default="")
        assert held == longest


def test_text_flows_when_there_is_nothing_to_stop_at() -> None:
    assert StopMatcher(StopTable([])).push("abc").text == "abc"


def test_across_three_pieces() -> None:
    matcher = StopMatcher(StopTable(["</end>"]))
    assert [matcher.push(piece).text for piece in ("x<", "/e", "n")] == ["x", "", ""]
    result = matcher.push("d>y")
    assert (result.text, result.stop) == ("", "</end>")


def test_false_alarm_lets_the_text_go() -> None:
    matcher = StopMatcher(StopTable(["abcd"]))
    assert [matcher.push(piece).text for piece in ("ab", "c", "x")] == ["", "", "abcx"]


def test_include_keeps_the_stop_string_and_nothing_after() -> None:
    result = StopMatcher(StopTable(["stop"]), include=True).push("a stop b")
    assert (result.text, result.stop) == ("a stop", "stop")


HOSTILE = [chr(97 + i % 26) * 900 + f"{i:0124d}" for i in range(64)]
"""As many stop strings as a request may have, as long as they may be, many of them beginning alike."""


def test_a_table_costs_nothing_before_text_comes() -> None:
    table = StopTable(HOSTILE)
    assert table.num_states == 1
    matcher = StopMatcher(table)
    assert matcher.push("A text that is capital letters").text != ""
    assert table.num_states < 100


def test_sequences_share_a_table() -> None:
    """What the first sequence has made of it is there for all the others, and no text makes it grow for ever."""
    table = StopTable(HOSTILE)
    text = HOSTILE[7][:-1] + "?" + HOSTILE[8][:-1] + "?" + HOSTILE[60][3:-2]
    shown, stop = run(StopMatcher(table), [(text, True)])
    assert ("".join(shown), stop) == (text, None)
    made = table.num_states
    assert made <= 1 + sum(map(len, HOSTILE))
    for size in (1, 3, 1000):
        shown, stop = run(StopMatcher(table), [(text[i : i + size], True) for i in range(0, len(text), size)])
        assert ("".join(shown), stop) == (text, None)
    assert table.num_states == made


def test_many_states_made_at_once() -> None:
    """The last character of a text that every end of begins a stop string; no recursion as deep as that."""
    longest = "ab" * 500
    table = StopTable([longest[i:] + "!" for i in range(64)] + [longest + "x"])
    assert run(StopMatcher(table), [(longest + "!", True)]) == ([""], longest + "!")
