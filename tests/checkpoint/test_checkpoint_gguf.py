"""GGUF files: every quantisation, every kind of metadata, and every way to be broken."""

from __future__ import annotations

import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
from checkpoint_files import LLAMA, random_tensors, write_gguf
from gguf import GGMLQuantizationType

from jaxserve.checkpoint.gguf import GGUFFile
from jaxserve.core.errors import CheckpointError
from jaxserve.models.registry import spec_from_hf

ROWS, BLOCKS = 6, 3


def dequantisable() -> list[GGMLQuantizationType]:
    found = []
    for kind in GGMLQuantizationType:
        _, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        try:
            gguf.dequantize(np.zeros((1, block_bytes), np.uint8), kind)
        except NotImplementedError:
            continue
        found.append(kind)
    return found


def test_the_library_dequantises_what_we_think() -> None:
    assert {kind.name for kind in dequantisable()} >= {"F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"}
    assert {kind.name for kind in dequantisable()} >= {
        "Q2_K",
        "Q3_K",
        "Q4_K",
        "Q5_K",
        "Q6_K",
        "IQ4_NL",
        "IQ4_XS",
        "TQ1_0",
    }
    assert len(dequantisable()) >= 25


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # random bytes make overflowing scales
@pytest.mark.parametrize("kind", dequantisable(), ids=lambda kind: kind.name)
def test_every_quantisation_reads_as_the_library_says(tmp_path: Path, kind: GGMLQuantizationType) -> None:
    block_len, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    width = block_len * BLOCKS if block_len > 1 else 48
    row_bytes = width // block_len * block_bytes
    stored = np.random.default_rng(kind.value).integers(0, 256, (ROWS, row_bytes), np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "one.gguf", "llama")
    writer.add_tensor("other", np.arange(5, dtype=np.float32))
    writer.add_tensor("matrix", stored, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    expected = gguf.dequantize(stored, kind)
    file = GGUFFile(tmp_path / "one.gguf")
    assert file.shapes == {"other": (5,), "matrix": (ROWS, width)}
    np.testing.assert_array_equal(file.read("matrix", ((0, ROWS), (0, width))), expected)
    np.testing.assert_array_equal(file.read("matrix", ((2, 5), (7, width - 3))), expected[2:5, 7 : width - 3])
    file.release()
    np.testing.assert_array_equal(file.read("other", ((1, 3),)), [1.0, 2.0])
    file.close()


def test_metadata_of_every_type(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "keys.gguf", "llama")
    writer.add_uint8("u8", 200)
    writer.add_int8("i8", -3)
    writer.add_uint16("u16", 60000)
    writer.add_int16("i16", -300)
    writer.add_uint32("u32", 4_000_000_000)
    writer.add_int32("i32", -5)
    writer.add_float32("f32", 0.5)
    writer.add_bool("yes", True)
    writer.add_string("text", "größe 😀")
    writer.add_uint64("u64", 2**63)
    writer.add_int64("i64", -(2**60))
    writer.add_float64("f64", 0.1)
    writer.add_array("ints", [1, 2, 3])
    writer.add_array("strings", ["a", "", "é"])
    writer.add_array("nested", [[1, 2], [3]])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = GGUFFile(tmp_path / "keys.gguf")
    assert dict(file.metadata) == {
        "general.architecture": "llama",
        "u8": 200,
        "i8": -3,
        "u16": 60000,
        "i16": -300,
        "u32": 4_000_000_000,
        "i32": -5,
        "f32": 0.5,
        "yes": True,
        "text": "größe 😀",
        "u64": 2**63,
        "i64": -(2**60),
        "f64": 0.1,
        "ints": [1, 2, 3],
        "strings": ["a", "", "é"],
        "nested": [[1, 2], [3]],
    }


@pytest.fixture
def small(tmp_path: Path) -> Path:
    spec = spec_from_hf({**LLAMA, "num_hidden_layers": 1}, {}, "config.json")
    return write_gguf(tmp_path / "small.gguf", spec, random_tensors(spec))


def test_truncation_anywhere_is_one_sentence(small: Path) -> None:
    whole = small.read_bytes()
    cuts = [*range(5, 1200, 37), len(whole) // 2, len(whole) - 1]
    for cut in cuts:
        small.write_bytes(whole[:cut])
        with pytest.raises(CheckpointError, match=r"truncated or corrupt .* download it again\.$"):
            GGUFFile(small)


def test_what_is_no_gguf_file_is_refused(small: Path) -> None:
    whole = small.read_bytes()
    small.write_bytes(b"PK\x03\x04" + whole[4:])
    with pytest.raises(CheckpointError, match="is not a GGUF file"):
        GGUFFile(small)
    small.write_bytes(b"")
    with pytest.raises(CheckpointError, match="cannot be read"):
        GGUFFile(small)
    small.write_bytes(b"GGUF" + struct.pack("<I", 1) + whole[8:])
    with pytest.raises(CheckpointError, match="GGUF version 1; versions 2 and 3 are supported"):
        GGUFFile(small)
    with pytest.raises(CheckpointError, match="cannot be read"):
        GGUFFile(small.with_name("absent.gguf"))


def test_garbage_in_the_header_never_escapes_as_another_error(small: Path) -> None:
    whole = bytearray(small.read_bytes())
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(300):
        broken = whole.copy()
        for position in rng.integers(8, 2000, 4):
            broken[position] = rng.integers(0, 256)
        small.write_bytes(broken)
        try:
            GGUFFile(small).close()
        except CheckpointError:
            refused += 1
    assert refused > 50


def test_unknown_formats_are_named(small: Path) -> None:
    whole = small.read_bytes()
    at = whole.index(b"token_embd.weight") + len("token_embd.weight") + 4 + 16
    small.write_bytes(whole[:at] + struct.pack("<I", 999) + whole[at + 4 :])
    with pytest.raises(CheckpointError, match=r"token_embd\.weight is stored in the unknown format 999"):
        GGUFFile(small)
    small.write_bytes(whole[:at] + struct.pack("<I", GGMLQuantizationType.I32) + whole[at + 4 :])
    file = GGUFFile(small)
    with pytest.raises(CheckpointError, match=r"token_embd\.weight is stored as I32, which is not supported"):
        file.read("token_embd.weight", ((0, 1), (0, 1)))


def test_dtype_is_that_of_the_weights(tmp_path: Path) -> None:
    spec = spec_from_hf(LLAMA, {}, "config.json")
    for kind, dtype in [("F32", "float32"), ("F16", "float16"), ("BF16", "bfloat16"), ("Q8_0", "bfloat16")]:
        path = write_gguf(tmp_path / f"{kind}.gguf", spec, random_tensors(spec), kind=GGMLQuantizationType[kind])
        assert GGUFFile(path).dtype == dtype
