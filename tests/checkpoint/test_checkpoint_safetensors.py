"""Safetensors folders: sharded, single, unaligned, and broken in every way."""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxserve.checkpoint.safetensors import SafetensorsFolder
from jaxserve.core.errors import CheckpointError

INDEX = "model.safetensors.index.json"


def write(path: Path, header: object, data: bytes) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_file({"a": np.arange(12, dtype=np.float32).reshape(3, 4)}, tmp_path / "model.safetensors")
    return tmp_path


def test_slices(folder: Path) -> None:
    reader = SafetensorsFolder(folder)
    assert reader.shapes == {"a": (3, 4)}
    np.testing.assert_array_equal(reader.read("a", ((1, 3), (2, 4))), [[6, 7], [10, 11]])
    reader.release()
    np.testing.assert_array_equal(reader.read("a", ((0, 1), (0, 4))), [[0, 1, 2, 3]])


def test_tensors_at_odd_offsets_are_read(tmp_path: Path) -> None:
    values = np.arange(4, dtype=ml_dtypes.bfloat16)
    entry = {"dtype": "BF16", "shape": [4], "data_offsets": [3, 11]}
    write(tmp_path / "model.safetensors", {"__metadata__": {"format": "pt"}, "a": entry}, b"xyz" + values.tobytes())
    np.testing.assert_array_equal(SafetensorsFolder(tmp_path).read("a", ((1, 4),)), values[1:])


def test_truncation_anywhere_is_one_sentence(folder: Path) -> None:
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    for cut in range(1, len(whole)):
        file.write_bytes(whole[:cut])
        with pytest.raises(CheckpointError, match=r"truncated or corrupt .*; download it again\.$"):
            SafetensorsFolder(folder)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"{nonsense", "is not valid JSON"),
        (b"\xff\xfe", "is not valid JSON"),
        (b"[1]", "is not a JSON object"),
        ({"a": 3}, "entry of tensor a is malformed"),
        ({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, "entry of tensor a is malformed"),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, r"4 bytes for shape \[2\] of F32"),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [8, 4]}}, "-4 bytes"),
        ({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}, "tensor a ends at byte"),
    ],
)
def test_garbage_headers(tmp_path: Path, header: object, message: str) -> None:
    write(tmp_path / "model.safetensors", header, b"12345678")
    with pytest.raises(CheckpointError, match=message):
        SafetensorsFolder(tmp_path)


def test_header_length_beyond_the_file(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes((1 << 62).to_bytes(8, "little") + b"{}")
    with pytest.raises(CheckpointError, match="its header should end at byte"):
        SafetensorsFolder(folder)


def test_missing_shards_are_named(folder: Path) -> None:
    weight_map = {"a": "one.safetensors", "b": "model.safetensors", "c": "two.safetensors"}
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match=r"lacks 2 of its 3 weight files \(one.safetensors, two.safetensors\)"):
        SafetensorsFolder(folder)


def test_a_single_file_wins_over_an_index_that_is_left(folder: Path) -> None:
    """As in `transformers`: whether the shards of the index are there or not."""
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}))
    assert SafetensorsFolder(folder).shapes == {"a": (3, 4)}
    save_file({"a": np.zeros(1, np.float32)}, folder / "one.safetensors")
    save_file({"b": np.zeros(1, np.float32)}, folder / "two.safetensors")
    assert SafetensorsFolder(folder).shapes == {"a": (3, 4)}
    (folder / "model.safetensors").unlink()
    assert SafetensorsFolder(folder).shapes == {"a": (1,), "b": (1,)}


def test_a_single_file_that_is_cut_off_is_not_passed_over(folder: Path) -> None:
    save_file({"a": np.zeros(1, np.float32)}, folder / "one.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": "one.safetensors"}}))
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-1])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is truncated or corrupt"):
        SafetensorsFolder(folder)


def test_many_missing_shards_are_not_all_named(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / INDEX).write_text(json.dumps({"weight_map": {str(i): f"{i:05}.safetensors" for i in range(5000)}}))
    with pytest.raises(CheckpointError, match=r"lacks 5000 of its 5000 weight files \(.*and 4992 more\)") as caught:
        SafetensorsFolder(folder)
    assert len(str(caught.value)) < 500


def test_broken_index(folder: Path) -> None:
    (folder / INDEX).write_text("{")
    with pytest.raises(CheckpointError, match="is not valid JSON"):
        SafetensorsFolder(folder)
    (folder / INDEX).write_text('{"weight_map": {"a": 3}}')
    with pytest.raises(CheckpointError, match="has no weight_map"):
        SafetensorsFolder(folder)
    (folder / INDEX).write_text('{"weight_map": {}}')
    with pytest.raises(CheckpointError, match="has no weight_map"):
        SafetensorsFolder(folder)
    (folder / INDEX).write_text('{"weight_map": {"a": "../../etc/passwd"}}')
    with pytest.raises(CheckpointError, match="names files outside its folder"):
        SafetensorsFolder(folder)


def test_a_tensor_in_two_files(folder: Path) -> None:
    save_file({"a": np.zeros(1, np.float32)}, folder / "other.safetensors")
    weight_map = {"a": "model.safetensors", "b": "other.safetensors"}
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match=r"tensor a is in both model.safetensors and other.safetensors"):
        SafetensorsFolder(folder)


def test_folders_without_safetensors(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has neither model.safetensors nor model.safetensors.index.json"):
        SafetensorsFolder(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"convert them to safetensors"):
        SafetensorsFolder(tmp_path)
