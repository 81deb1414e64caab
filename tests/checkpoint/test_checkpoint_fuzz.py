"""Whatever bytes a checkpoint has: an error of ours comes out, in bounded time and memory, or the checkpoint is read.

Small valid files are changed as bad disks and attackers change them: bits flipped, ends cut off, numbers overwritten by
extreme ones, JSON values exchanged for others.
"""

from __future__ import annotations

import copy
import json
import shutil
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from checkpoint_files import LLAMA, random_tensors, write_folder, write_gguf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxserve.checkpoint.gguf import MAX_ELEMENTS, GGUFFile
from jaxserve.checkpoint.gguf_parts import GGUFParts
from jaxserve.checkpoint.safetensors import SafetensorsFolder
from jaxserve.checkpoint.sources import CheckpointSource, SourceKind, load_spec, load_tokenizer
from jaxserve.core.errors import CheckpointError, JaxserveError
from jaxserve.models.registry import spec_from_hf
from jaxserve.text.tokenizer import tokenizer_from_folder

TEXT_DATA = Path(__file__).parents[1] / "text" / "data"
FUZZ = settings(
    max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
SPEC = spec_from_hf({**LLAMA, "num_hidden_layers": 1}, {}, "config.json")
WORDS = ["<unk>", "<s>", "</s>", *(f"t{index}" for index in range(37))]
VOCABULARY: dict[str, object] = {
    "tokenizer.ggml.model": "llama",
    "tokenizer.ggml.tokens": WORDS,
    "tokenizer.ggml.scores": [0.0] * 40,
    "tokenizer.ggml.token_type": [gguf.TokenType.UNKNOWN, gguf.TokenType.CONTROL, gguf.TokenType.CONTROL] + [1] * 37,
}
NUMBERS = [0, 1, 2, 7, 255, 1 << 16, 1 << 31, (1 << 32) - 1, 1 << 40, 1 << 62, (1 << 63) - 1, (1 << 64) - 1]


@st.composite
def changed(draw: st.DrawFn, whole: bytes, header: int) -> bytes:
    """The bytes with a few changes, most of them near the start, where the structure is."""
    content = bytearray(whole)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, min(header, len(content) - 1)))
        match draw(st.sampled_from(["flip", "byte", "int32", "int64", "cut", "insert"])):
            case "flip":
                content[at] ^= 1 << draw(st.integers(0, 7))
            case "byte":
                content[at] = draw(st.integers(0, 255))
            case "int32":
                content[at : at + 4] = struct.pack("<I", draw(st.sampled_from(NUMBERS)) & 0xFFFFFFFF)
            case "int64":
                content[at : at + 8] = struct.pack("<Q", draw(st.sampled_from(NUMBERS)))
            case "cut":
                del content[max(1, at) :]
            case _:
                content[at:at] = draw(st.binary(max_size=9))
    return bytes(content)


LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([*NUMBERS, -1, 10**30, 1e308, float("inf"), float("nan"), -0.0]),
    st.sampled_from(["", "a", "\ud800", "\0", "<s>", "x" * 300, "5", "-1"]),
)
VALUES = (
    LEAVES | st.lists(LEAVES, max_size=3) | st.sampled_from([{}, {"a": 1}, [[]], [{}], {"content": None}, {"type": 7}])
)
"""JSON values of every kind, extreme ones among them."""


@st.composite
def altered(draw: st.DrawFn, document: dict[str, Any]) -> dict[str, Any]:
    """A JSON object with a few values, at any depth, exchanged or removed."""
    root: dict[str, Any] = json.loads(json.dumps(document))
    for _ in range(draw(st.integers(1, 3))):
        holder: Any = root
        while True:
            keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
            if not keys:
                break
            key = draw(st.sampled_from(keys[:60]))
            if isinstance(holder[key], dict | list) and holder[key] and draw(st.booleans()):
                holder = holder[key]
                continue
            if isinstance(holder, dict) and draw(st.integers(0, 4)) == 0:
                del holder[key]
            else:
                holder[key] = copy.deepcopy(draw(VALUES))
            break
    return root


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GGUF file and a Hugging Face folder."""
    folder = tmp_path_factory.mktemp("valid")
    write_gguf(folder / "model.gguf", SPEC, random_tensors(SPEC), keys=VOCABULARY)
    write_folder(folder / "hf", {**LLAMA, "num_hidden_layers": 1}, random_tensors(SPEC))
    return folder


@contextmanager
def one_sentence(most_chars: int = 2000) -> Iterator[None]:
    """Where an error of ours may come out, of a length that a user can read, and no other."""
    too_long = None
    try:
        yield
    except JaxserveError as error:
        too_long = str(error) if len(str(error)) > most_chars else None
    assert too_long is None


def read_everything(source: CheckpointSource) -> None:
    """All that serving reads, each tensor included."""
    load_spec(source)
    tokenizer = load_tokenizer(source)
    tokenizer.decode(tokenizer.encode("<s> the t1 é"))
    reader = GGUFParts(source.path) if source.kind is SourceKind.GGUF else SafetensorsFolder(source.path)
    try:
        for name, shape in reader.shapes.items():
            np.array(reader.read(name, tuple((0, dim) for dim in shape)))
    finally:
        reader.close()


@FUZZ
@given(data=st.data())
def test_gguf_files(valid: Path, tmp_path: Path, data: st.DataObject) -> None:
    whole = (valid / "model.gguf").read_bytes()
    path = tmp_path / "model.gguf"
    path.write_bytes(data.draw(changed(whole, 2600)))
    with one_sentence():
        read_everything(CheckpointSource(kind=SourceKind.GGUF, path=path, name="m"))


@FUZZ
@given(data=st.data())
def test_safetensors_files(valid: Path, tmp_path: Path, data: st.DataObject) -> None:
    whole = (valid / "hf" / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(data.draw(changed(whole, 1200)))
    with one_sentence():
        reader = SafetensorsFolder(tmp_path)
        for name, shape in reader.shapes.items():
            np.array(reader.read(name, tuple((0, dim) for dim in shape)))


@FUZZ
@given(data=st.data())
def test_safetensors_headers(valid: Path, tmp_path: Path, data: st.DataObject) -> None:
    whole = (valid / "hf" / "model.safetensors").read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header = json.dumps(data.draw(altered(json.loads(whole[8 : 8 + length])))).encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + whole[8 + length :])
    with one_sentence(5000):
        reader = SafetensorsFolder(tmp_path)
        for name, shape in reader.shapes.items():
            np.array(reader.read(name, tuple((0, dim) for dim in shape)))


@FUZZ
@given(data=st.data())
def test_index_files(valid: Path, tmp_path: Path, data: st.DataObject) -> None:
    index = {"metadata": {"total_size": 5}, "weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(data.draw(altered(index))))
    with pytest.raises(CheckpointError):
        SafetensorsFolder(tmp_path)


@FUZZ
@given(data=st.data())
def test_configs(tmp_path: Path, data: st.DataObject) -> None:
    config = {**LLAMA, "rope_scaling": {"rope_type": "linear", "factor": 2.0}, "layer_types": ["full_attention"]}
    generation = {"eos_token_id": [2, 3], "temperature": 0.6, "top_p": 0.9}
    (tmp_path / "config.json").write_text(json.dumps(data.draw(altered(config))))
    (tmp_path / "generation_config.json").write_text(json.dumps(data.draw(altered(generation))))
    with one_sentence(5000):
        load_spec(CheckpointSource(kind=SourceKind.HF, path=tmp_path, name="m"))


@FUZZ
@given(data=st.data())
def test_tokenizer_files(tmp_path: Path, data: st.DataObject) -> None:
    folder = tmp_path / "model"
    if not folder.exists():
        shutil.copytree(TEXT_DATA / "llama2_folder", folder)
    config = json.loads((TEXT_DATA / "llama2_folder" / "tokenizer_config.json").read_text())
    config = {**config, "add_bos_token": True, "add_eos_token": None, "chat_template": [{"name": "a", "template": "b"}]}
    config["added_tokens_decoder"] = {"9": {"content": "<tool>", "special": False, "normalized": False}}
    (folder / "tokenizer_config.json").write_text(json.dumps(data.draw(altered(config))))
    document = json.loads((TEXT_DATA / "llama2_folder" / "tokenizer.json").read_text())
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2, "a": 3, "\u2581": 4, "<0xC3>": 5, "<0xA9>": 6, "<tool>": 9}
    document["model"] |= {"vocab": vocab, "merges": []}
    (folder / "tokenizer.json").write_text(json.dumps(data.draw(altered(document))))
    with one_sentence():
        tokenizer = tokenizer_from_folder(folder)
        tokenizer.decode(tokenizer.encode("<s> the é"))


def header(num_tensors: int, *entries: bytes) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, num_tensors, len(entries)) + b"".join(entries)


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def array(key: str, kinds: list[int], *lengths: int) -> bytes:
    """The start of arrays in each other, of which each has one element."""
    starts = (struct.pack("<IQ", kind, length) for kind, length in zip(kinds, lengths, strict=True))
    return text(key) + struct.pack("<I", 9) + b"".join(starts)


def tensor(name: str, dims: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


UINT8 = 0
DEEP = 200_000


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (header(0, array("a", [9] * DEEP + [UINT8], *[1] * (DEEP + 1)) + b"\0"), "nested deeper than 4 levels"),
        (header(0, array("a", [8], 1 << 62)), f"more than {MAX_ELEMENTS} entries"),
        (header(0, array("a", [UINT8], MAX_ELEMENTS) + bytes(MAX_ELEMENTS)), f"more than {MAX_ELEMENTS} entries"),
        (header(0, array("a", [9], 1 << 22) + struct.pack("<IQ", 9, 0) * 10), "breaks off"),
        (header(1 << 63), f"more than {MAX_ELEMENTS} entries"),
        (header(0, *[text("a") + struct.pack("<IB", UINT8, 1)] * 2), "has the metadata key a twice"),
        (header(2) + tensor("a", (4,)) * 2, "has the tensor name a twice"),
        (header(1) + tensor("a", (1 << 32, 1 << 32)) + bytes(64), "tensor a has the shape"),  # 2**64 wraps to 0
        (header(1) + tensor("a", (1 << 62, 4)) + bytes(64), "tensor a has the shape"),
        (header(1) + tensor("a", (0, 1 << 63)) + bytes(64), "tensor a has the shape"),
        (header(1) + tensor("a", (1 << 31, 1 << 28)) + bytes(64), "tensor a ends at byte"),
        (header(1) + tensor("a", (8,), offset=(1 << 64) - 8) + bytes(64), "tensor a ends at byte"),
        (header(1) + tensor("a", (1,) * 200), "has 200 dimensions"),
        (header(0, text("general.alignment") + struct.pack("<IQ", 10, 0)), "general.alignment is 0"),
        (header(0, text("general.alignment") + struct.pack("<I", 8) + text("x" * 500)), "general.alignment is 'x"),
    ],
)
def test_absurd_gguf_headers(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        GGUFFile(path)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"a": {"dtype": "F32", "shape": [1 << 62, 4], "data_offsets": [0, 0]}}, "malformed"),
        ({"a": {"dtype": "F32", "shape": [1 << 32, 1 << 32], "data_offsets": [0, 0]}}, "0 bytes for shape"),
        ({"a": {"dtype": "F32", "shape": [1] * 9, "data_offsets": [0, 4]}}, "malformed"),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 1 << 70]}}, "bytes for shape"),
        (
            {key: {"dtype": "F32", "shape": [1], "data_offsets": [i, i + 4]} for i, key in enumerate("ab")},
            "tensors a and b overlap",
        ),
    ],
)
def test_absurd_safetensors_headers(tmp_path: Path, entries: object, message: str) -> None:
    header = json.dumps(entries).encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(64))
    with pytest.raises(CheckpointError, match=message):
        SafetensorsFolder(tmp_path)


@pytest.mark.parametrize(
    "sizes",
    [
        {"num_hidden_layers": 10**12},
        {"vocab_size": 1 << 62},
        {"hidden_size": 1 << 62, "num_attention_heads": 1 << 60},
        {"max_position_embeddings": 10**400},
    ],
)
def test_absurd_sizes(tmp_path: Path, sizes: dict[str, int]) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA, **sizes}))
    with pytest.raises(CheckpointError, match=rf"describes a model that cannot be \({next(iter(sizes))} = ") as caught:
        load_spec(CheckpointSource(kind=SourceKind.HF, path=tmp_path, name="m"))
    assert len(str(caught.value)) < 500


def test_absurd_sizes_of_gguf(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", SPEC, random_tensors(SPEC), keys={"llama.vocab_size": 4_000_000_000})
    with pytest.raises(CheckpointError, match=r"cannot be \(llama\.vocab_size = 4000000000"):
        load_spec(CheckpointSource(kind=SourceKind.GGUF, path=path, name="m"))
