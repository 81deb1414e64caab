"""Incremental detokenisation: any way to cut a sequence gives the text of the whole."""

from hypothesis import given
from hypothesis import strategies as st
from test_text_tokenizer import TEXTS, byte_level, sentence_piece

from jaxserve.text.detokenize import IncrementalDetokenizer
from jaxserve.text.tokenizer import BackendTokenizer

BYTE_LEVEL = byte_level()
SENTENCE_PIECE = sentence_piece()
# Bytes alone, so that ill-formed and split characters are common.
BYTE_IDS = {
    id(BYTE_LEVEL): [i for i in range(BYTE_LEVEL.vocab_size) if len(BYTE_LEVEL.token_bytes(i)) == 1],
    id(SENTENCE_PIECE): list(range(3, 3 + 256)),
}


def cuts(tokenizer: BackendTokenizer) -> st.SearchStrategy[list[list[int]]]:
    """Token ids in pieces; ids without a token among them."""
    any_id = st.integers(0, tokenizer.vocab_size + 2)
    return st.lists(st.lists(any_id | st.sampled_from(BYTE_IDS[id(tokenizer)]), max_size=5), max_size=12)


def check(tokenizer: BackendTokenizer, pieces: list[list[int]], skips: bool) -> None:
    detokenizer = IncrementalDetokenizer(tokenizer, skip_special_tokens=skips)
    text = "".join(detokenizer.push(piece) for piece in pieces) + detokenizer.flush()
    # A token in front stands for the prompt that the output continues.
    [anchor] = tokenizer.encode("a", add_special_tokens=False)[-1:]
    whole = [anchor, *(token_id for piece in pieces for token_id in piece)]
    prompt_text = tokenizer.decode([anchor], skip_special_tokens=skips)
    assert prompt_text + text == tokenizer.decode(whole, skip_special_tokens=skips)
    assert detokenizer.flush() == ""


@given(cuts(BYTE_LEVEL), st.booleans())
def test_byte_level_pieces_make_the_whole(pieces: list[list[int]], skips: bool) -> None:
    check(BYTE_LEVEL, pieces, skips)
    known = [token_id for piece in pieces for token_id in piece if token_id < BYTE_LEVEL.vocab_size]
    # The library's own decoder agrees, ill-formed UTF-8 included.
    expected = BYTE_LEVEL.backend.decode(known, skip_special_tokens=skips)
    assert BYTE_LEVEL.decode(known, skip_special_tokens=skips) == expected


@given(cuts(SENTENCE_PIECE), st.booleans())
def test_sentence_piece_pieces_make_the_whole(pieces: list[list[int]], skips: bool) -> None:
    check(SENTENCE_PIECE, pieces, skips)
    known = [token_id for piece in pieces for token_id in piece if token_id < SENTENCE_PIECE.vocab_size]
    text = SENTENCE_PIECE.decode(known, skip_special_tokens=skips)
    if "\ufffd" not in text:
        assert text == SENTENCE_PIECE.backend.decode(known, skip_special_tokens=skips)


def test_no_half_character_ever_leaves() -> None:
    for tokenizer in (BYTE_LEVEL, SENTENCE_PIECE):
        for text in TEXTS:
            if "\ufffd" not in text:
                detokenizer = IncrementalDetokenizer(tokenizer, skip_special_tokens=False)
                ids = tokenizer.encode(text, add_special_tokens=False)
                assert all("\ufffd" not in detokenizer.push([token_id]) for token_id in ids)
                assert detokenizer.flush() == ""


def test_character_comes_with_its_last_byte() -> None:
    detokenizer = IncrementalDetokenizer(SENTENCE_PIECE)
    assert [detokenizer.push([3 + byte]) for byte in "é😀".encode()] == ["", "é", "", "", "", "😀"]


def test_unfinished_character_at_the_end() -> None:
    detokenizer = IncrementalDetokenizer(SENTENCE_PIECE)
    assert detokenizer.push([3 + 0xF0, 3 + 0x9F]) == ""
    assert detokenizer.flush() == "\ufffd"


def test_a_continued_prompt_keeps_the_space() -> None:
    ids = SENTENCE_PIECE.encode("the", add_special_tokens=False)
    assert SENTENCE_PIECE.decode(ids) == "the"
    assert IncrementalDetokenizer(SENTENCE_PIECE).push(ids) == " the"


def test_special_tokens_do_not_cut_a_character() -> None:
    ids = [3 + 0xC3, 2, 3 + 0xA9]
    assert IncrementalDetokenizer(SENTENCE_PIECE).push(ids) == "é"
    assert IncrementalDetokenizer(SENTENCE_PIECE, skip_special_tokens=False).push(ids) == "\ufffd</s>\ufffd"
