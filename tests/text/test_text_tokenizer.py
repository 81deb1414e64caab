"""Tokenizers against independent references: llama.cpp for GGUF metadata, transformers for Hugging Face folders."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from jaxserve.core.errors import CheckpointError, InvalidRequestError
from jaxserve.text.gguf_tokenizer import PRE_TOKENIZERS, tokenizer_from_gguf
from jaxserve.text.tokenizer import BackendTokenizer, Tokenizer, tokenizer_from_folder

DATA = Path(__file__).parent / "data"


def read(name: str) -> Any:
    return json.loads((DATA / f"{name}.json").read_text(encoding="utf-8"))


TEXTS: list[str] = read("hard_texts")
VOCABULARIES = read("vocabularies")
LLAMA_CPP = read("tokenizer_goldens")["cases"]
TRANSFORMERS = read("text_goldens")["folders"]
# llama.cpp's merges can arrive at a byte token written out as text; SentencePiece itself never does that.
KNOWN_DIFFERENCES = {("sentence-piece-no-prefix", "<0x0A>")}


def toy(vocabulary: str, fields: Mapping[str, object]) -> BackendTokenizer:
    """A tokenizer of a toy vocabulary with the given keys of its GGUF metadata."""
    return tokenizer_from_gguf(
        {f"tokenizer.ggml.{key}": v for key, v in {**VOCABULARIES[vocabulary], **fields}.items()}
    )


def byte_level(**fields: object) -> BackendTokenizer:
    return toy("byte_level", {"model": "gpt2", "pre": "smollm", "bos_token_id": 1, "eos_token_id": 2, **fields})


def sentence_piece(**fields: object) -> BackendTokenizer:
    return toy("sentence_piece", {"model": "llama", "bos_token_id": 1, "eos_token_id": 2, **fields})


@pytest.mark.parametrize("name", [name for name in LLAMA_CPP if name != "smollm2"])
def test_gguf_ids_equal_llama_cpp(name: str) -> None:
    case = LLAMA_CPP[name]
    tokenizer = toy(case["vocabulary"], case["metadata"])
    different = {
        text: (tokenizer.encode(text), ids)
        for text, ids in zip(TEXTS, case["ids"], strict=True)
        if tokenizer.encode(text) != ids and (name, text) not in KNOWN_DIFFERENCES
    }
    assert different == {}


def test_names_of_the_same_rule() -> None:
    assert PRE_TOKENIZERS["llama3"] is PRE_TOKENIZERS["llama-v3"] is PRE_TOKENIZERS["llama-bpe"]
    assert PRE_TOKENIZERS["starcoder"] is PRE_TOKENIZERS["smollm"]
    assert PRE_TOKENIZERS["deepseek-r1-qwen"] is PRE_TOKENIZERS["qwen2"]


@pytest.mark.parametrize("folder", list(TRANSFORMERS))
def test_folder_ids_equal_transformers(folder: str) -> None:
    golden = TRANSFORMERS[folder]
    tokenizer = tokenizer_from_folder(DATA / folder)
    assert [tokenizer.encode(text) for text in TEXTS] == golden["ids"]
    assert [tokenizer.encode(text, add_special_tokens=False) for text in TEXTS] == golden["plain_ids"]


@pytest.mark.parametrize("folder", list(TRANSFORMERS))
@pytest.mark.parametrize(("key", "skips"), [("decoded", False), ("decoded_without_special", True)])
def test_folder_texts_equal_transformers(folder: str, key: str, skips: bool) -> None:
    golden = TRANSFORMERS[folder]
    tokenizer = tokenizer_from_folder(DATA / folder)
    for ids, text in zip(golden["samples"], golden[key], strict=True):
        # Of byte tokens that are no UTF-8 the library makes one U+FFFD a byte; we do as it does for byte-level.
        if folder != "llama2_folder" or "\ufffd" not in text:
            assert tokenizer.decode(ids, skip_special_tokens=skips) == text


def test_folder_and_gguf_agree() -> None:
    gguf = toy("byte_level", {"model": "gpt2", "pre": "llama-bpe", "bos_token_id": 1, "eos_token_id": 2})
    folder = tokenizer_from_folder(DATA / "llama3_folder")
    assert [gguf.encode(text) for text in TEXTS] == [folder.encode(text) for text in TEXTS]
    assert gguf.special_tokens == folder.special_tokens
    assert folder.eos_token_ids == (2,)
    assert gguf.eos_token_ids == (2, 0), "<|endoftext|> is known by its text"


@pytest.mark.parametrize("tokenizer", [byte_level(), sentence_piece(), tokenizer_from_folder(DATA / "llama3_folder")])
def test_text_survives_the_round_trip(tokenizer: Tokenizer) -> None:
    for text in TEXTS:
        ids = tokenizer.encode(text, add_special_tokens=False)
        if tokenizer.vocab_size == len(VOCABULARIES["sentence_piece"]["tokens"]):
            # SentencePiece puts a space before the text and after each control token, and has no U+2581.
            if not any(tokenizer.is_special(i) or tokenizer.token_text(i) == "<tool>" for i in ids) and "▁" not in text:
                assert tokenizer.decode(ids, skip_special_tokens=False) == text
        else:
            assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_control_tokens_in_text_are_control_tokens() -> None:
    tokenizer = byte_level()
    ids = tokenizer.encode("<|im_start|>user<|im_end|>")
    assert (ids[0], ids[-1]) == (1, 2)
    assert tokenizer.decode(ids) == "user"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<|im_start|>user<|im_end|>"
    assert tokenizer.is_special(1)
    tool = tokenizer.encode("<tool>")
    assert len(tool) == 1, "a user-defined token is one token"
    assert tokenizer.decode(tool) == "<tool>", "but it is text, not control"


def test_token_bytes_and_text() -> None:
    tokenizer = byte_level()
    ids = tokenizer.encode("😀")
    assert b"".join(tokenizer.token_bytes(i) for i in ids) == "😀".encode()
    assert tokenizer.token_text(tokenizer.backend.token_to_id("Ġ")) == " "
    assert tokenizer.token_text(tokenizer.backend.token_to_id("ð")) == "\ufffd"
    assert tokenizer.token_bytes(1) == b"<|im_start|>"
    assert tokenizer.token_bytes(tokenizer.vocab_size) == b""
    assert tokenizer.token_bytes(-1) == b""
    spaced = sentence_piece()
    assert spaced.token_bytes(3 + 0x0A) == b"\n"
    assert spaced.token_bytes(3 + 0xF0) == b"\xf0"
    assert spaced.token_text(spaced.backend.token_to_id("▁")) == " "


def test_invalid_utf8_in_byte_tokens() -> None:
    tokenizer = sentence_piece()
    byte = {value: 3 + value for value in range(256)}
    assert tokenizer.decode([byte[0xF0], byte[0x9F], byte[0x98], byte[0x80]]) == "😀"
    assert tokenizer.decode([byte[0xE4], byte[0xBD]]) == "\ufffd"
    assert tokenizer.decode([byte[0xE4], byte[0xBD], byte[0xA0], byte[0xFF]]) == "你\ufffd"
    assert tokenizer.decode([byte[0xC0], byte[0x80]]) == "\ufffd\ufffd"


def test_space_before_sentence_piece_text() -> None:
    tokenizer = sentence_piece()
    ids = tokenizer.encode("the the", add_special_tokens=False)
    assert tokenizer.token_text(ids[0]).startswith(" ")
    assert tokenizer.decode(ids) == "the the"
    assert tokenizer.decode([1, *ids], skip_special_tokens=False) == "<s> the the"
    assert tokenizer.encode("") == [1]
    bare = sentence_piece(add_space_prefix=False)
    assert bare.decode(bare.encode(" the")) == " the"


def test_prompt_wrapping_flags() -> None:
    assert byte_level(add_bos_token=True).encode("the")[0] == 1
    assert byte_level(add_eos_token=True).encode("the")[-1] == 2
    assert byte_level(add_bos_token=True).encode("the", add_special_tokens=False) == byte_level().encode("the")
    assert sentence_piece(add_bos_token=False).encode("the") == sentence_piece().encode("the")[1:]


def test_end_tokens_are_collected_once() -> None:
    tokenizer = byte_level(eot_token_id=0, eom_token_id=2)
    assert tokenizer.eos_token_ids == (2, 0)


def test_unpaired_surrogate_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match=r"unpaired surrogate \(U\+D800\) at character 2"):
        byte_level().encode("ab\ud800")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model": "bert"}, r"tokenizer.ggml.model is 'bert'; supported are 'gpt2'"),
        ({"model": 3}, r"tokenizer.ggml.model must be text"),
        ({"pre": "chaos"}, r"'chaos', whose word splitting is not known here; known are .*default.*smollm"),
        ({"merges": ["ab"]}, r"not two tokens: 'ab'"),
        ({"merges": ["zz qq"]}, r"is inconsistent"),
        ({"merges": None}, r"merges must be a list of strings"),
        ({"token_type": [1]}, r"do not describe one token each"),
        ({"eos_token_id": 10**9}, r"eos_token_id must be a token id"),
        ({"add_bos_token": "yes"}, r"add_bos_token must be true or false"),
    ],
)
def test_wrong_metadata_is_one_sentence(fields: Mapping[str, object], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        byte_level(**fields)


def test_missing_metadata_is_named() -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer.ggml.tokens is missing"):
        tokenizer_from_gguf({"tokenizer.ggml.model": "gpt2"})


def test_folder_special_tokens_in_both_forms() -> None:
    tokenizer = tokenizer_from_folder(DATA / "llama3_folder", eos_token_ids=(0, 2))
    assert tokenizer.special_tokens == {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    assert tokenizer.bos_token_id == 1
    assert tokenizer.eos_token_ids == (2, 0)


def test_folder_chat_templates() -> None:
    named = tokenizer_from_folder(DATA / "llama3_folder")
    assert named.chat_template == "{{ bos_token }}{{ messages[0].content }}"
    assert named.facts.chat_templates["tool_use"] == "tools:{{ tools | length }}"
    assert tokenizer_from_folder(DATA / "llama2_folder").chat_template == "[INST] {{ messages[0].content }} [/INST]"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(DATA / "llama3_folder", tmp_path / "model"))


def edit(folder: Path, **changes: object) -> None:
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_folder_flags_win_over_the_post_processor(folder: Path) -> None:
    edit(folder, add_bos_token=False, add_eos_token=True)
    tokenizer = tokenizer_from_folder(folder)
    plain = tokenizer.encode("the", add_special_tokens=False)
    assert tokenizer.encode("the") == [*plain, 2]


@pytest.mark.parametrize("bos", [None, True, False])
@pytest.mark.parametrize("eos", [None, True, False])
def test_each_side_is_governed_by_its_own_key(folder: Path, bos: bool | None, eos: bool | None) -> None:
    """As `transformers` 4.57 has it; the post-processor of this folder puts a BOS token before a text."""
    keys = {"add_bos_token": bos, "add_eos_token": eos}
    edit(folder, **{key: value for key, value in keys.items() if value is not None})
    tokenizer = tokenizer_from_folder(folder)
    plain = tokenizer.encode("the", add_special_tokens=False)
    before, after = [] if bos is False else [1], [2] if eos else []
    assert tokenizer.encode("the") == [*before, *plain, *after]
    assert tokenizer.encode("") == [*before, *after]


def test_what_the_post_processor_adds_is_kept(folder: Path) -> None:
    file = folder / "tokenizer.json"
    document = json.loads(file.read_text())
    both = {"type": "BertProcessing", "sep": ["<|im_end|>", 2], "cls": ["<|im_start|>", 1]}
    file.write_text(json.dumps({**document, "post_processor": both}))
    plain = tokenizer_from_folder(folder).encode("the", add_special_tokens=False)
    assert tokenizer_from_folder(folder).encode("the") == [1, *plain, 2]
    edit(folder, add_bos_token=False)
    assert tokenizer_from_folder(folder).encode("the") == [*plain, 2]
    edit(folder, add_bos_token=None, add_eos_token=False)
    assert tokenizer_from_folder(folder).encode("the") == [1, *plain]


def test_post_processors_that_do_more_are_refused(folder: Path) -> None:
    file = folder / "tokenizer.json"
    document = json.loads(file.read_text())
    document["post_processor"]["single"] *= 2
    file.write_text(json.dumps(document))
    with pytest.raises(CheckpointError, match="does something else than to put tokens before and after a text"):
        tokenizer_from_folder(folder)


@pytest.mark.parametrize("value", [1, "true", [], {}])
def test_flags_that_are_neither_true_nor_false(folder: Path, value: object) -> None:
    edit(folder, add_eos_token=value)
    with pytest.raises(CheckpointError, match=r"has add_eos_token = .*, which is neither true nor false"):
        tokenizer_from_folder(folder)


def test_folder_role_token_of_the_plain_vocabulary_becomes_special(folder: Path) -> None:
    edit(folder, eos_token="the")
    tokenizer = tokenizer_from_folder(folder)
    assert tokenizer.is_special(tokenizer.eos_token_ids[0])
    assert tokenizer.decode(tokenizer.encode("a the", add_special_tokens=False)) == "a "


def test_folder_template_files_win(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("file")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_text("rag")
    templates = tokenizer_from_folder(folder).facts.chat_templates
    assert templates == {"default": "file", "tool_use": "tools:{{ tools | length }}", "rag": "rag"}


def test_folder_faults_are_one_sentence(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no tokenizer\.json"):
        tokenizer_from_folder(tmp_path)
    edit(folder, eos_token=7)
    with pytest.raises(CheckpointError, match=r"eos_token that is neither text nor a token object: 7"):
        tokenizer_from_folder(folder)
    edit(folder, eos_token="<|im_end|>", added_tokens_decoder={"9999": {"content": "the", "special": True}})
    with pytest.raises(CheckpointError, match=r"tokenizer_config.json gives the token 'the' the id 9999"):
        tokenizer_from_folder(folder)
    (folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"is not valid JSON"):
        tokenizer_from_folder(folder)
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    with pytest.raises(CheckpointError, match=r"not a tokenizer that the tokenizers library can read"):
        tokenizer_from_folder(folder)


@pytest.mark.parametrize("decoder", [None, {"type": "WordPiece", "prefix": "##", "cleanup": True}])
def test_decoders_that_need_neighbours_are_refused(folder: Path, decoder: object) -> None:
    file = folder / "tokenizer.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "decoder": decoder}))
    with pytest.raises(CheckpointError, match="decoder"):
        tokenizer_from_folder(folder)


def test_metaspace_decoder(folder: Path) -> None:
    file = folder / "tokenizer.json"
    decoder = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
    model = {"type": "BPE", "vocab": {"▁▁a": 0, "▁b": 1, "é": 2}, "merges": []}
    edited = {**json.loads(file.read_text()), "decoder": decoder, "model": model, "added_tokens": []}
    file.write_text(json.dumps({**edited, "post_processor": None}))
    edit(folder, bos_token=None, eos_token=None)
    tokenizer = tokenizer_from_folder(folder)
    for ids in ([0, 1, 2], [1, 0], [2, 0], []):
        assert tokenizer.decode(ids) == tokenizer.backend.decode(ids)
