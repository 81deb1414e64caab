"""GGUF models in several files: any part names the model, and every part must be there and be what it says."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
from checkpoint_files import LLAMA, Tensors, random_tensors, write_gguf

from jaxserve.checkpoint.gguf import GGUFFile
from jaxserve.checkpoint.gguf_parts import GGUFParts
from jaxserve.checkpoint.sources import SourceKind, load_params, load_spec, resolve_source
from jaxserve.core.errors import CheckpointError
from jaxserve.models.decoder import Blueprint
from jaxserve.models.registry import spec_from_hf
from jaxserve.sharding.mesh import make_mesh

SPEC = spec_from_hf({**LLAMA, "num_hidden_layers": 1}, {}, "config.json")
TENSORS = random_tensors(SPEC)
NUM_PARTS = 3


def name(number: int, count: int = NUM_PARTS) -> str:
    return f"tiny-{number:05}-of-{count:05}.gguf"


def split(whole: Path, folder: Path, **changes: int) -> list[Path]:
    """The file in three parts, as `gguf-split` makes them: the first has all metadata, the others only their place."""
    reader = gguf.GGUFReader(whole)
    paths = []
    for number in range(NUM_PARTS):
        path = folder / name(number + 1)
        writer = gguf.GGUFWriter(path, "llama")
        if number == 0:
            for key, field in reader.fields.items():
                if key.startswith(("llama.", "tokenizer.")):
                    writer.add_key_value(key, field.contents(), field.types[0])
        writer.add_uint16("split.no", changes.get("no", number))
        writer.add_uint16("split.count", changes.get("count", NUM_PARTS))
        writer.add_int32("split.tensors.count", changes.get("tensors", len(reader.tensors)))
        for tensor in reader.tensors[number::NUM_PARTS]:
            writer.add_tensor(tensor.name, np.array(tensor.data))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        paths.append(path)
    return paths


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    return write_gguf(tmp_path / "whole.gguf", SPEC, TENSORS)


@pytest.mark.parametrize("number", range(NUM_PARTS))
def test_any_part_names_the_model(tmp_path: Path, whole: Path, number: int) -> None:
    paths = split(whole, tmp_path)
    source = resolve_source(str(paths[number]), cache_dir=None)
    assert (source.kind, source.path, source.name) == (SourceKind.GGUF, paths[0], "tiny")
    assert load_spec(source) == load_spec(resolve_source(str(whole), cache_dir=None))
    parts, one = GGUFParts(paths[number]), GGUFFile(whole)
    assert parts.shapes == one.shapes
    assert parts.dtype == one.dtype
    for tensor, shape in one.shapes.items():
        ranges = tuple((0, dim) for dim in shape)
        np.testing.assert_array_equal(parts.read(tensor, ranges), one.read(tensor, ranges))
    parts.close()
    one.close()


def test_parameters_come_from_all_parts(tmp_path: Path, whole: Path) -> None:
    mesh = make_mesh()
    blueprint = Blueprint.of(SPEC, dtype=np.dtype("float32"), quantization=None, mesh=mesh, kv_repeat=1, backend=None)
    found: list[Tensors] = []
    for path in (whole, split(whole, tmp_path)[1]):
        source = resolve_source(str(path), cache_dir=None)
        params = load_params(source, SPEC, blueprint.params(), mesh=mesh)
        found.append({key: np.asarray(value) for key, value in params.items()})
    assert found[0].keys() == found[1].keys()
    for key, value in found[0].items():
        np.testing.assert_array_equal(value, found[1][key])


def test_missing_parts_are_named(tmp_path: Path, whole: Path) -> None:
    paths = split(whole, tmp_path)
    paths[1].unlink()
    with pytest.raises(CheckpointError, match=r"lacks 1 of the 3 parts of tiny \(tiny-00002-of-00003\.gguf\)"):
        resolve_source(str(paths[2]), cache_dir=None)
    lonely = tmp_path / name(1, 9)
    paths[0].rename(lonely)
    with pytest.raises(CheckpointError, match=r"lacks 8 of the 9 parts of tiny \(.*-00004-of-00009\.gguf and 5 more\)"):
        GGUFParts(lonely)


def test_a_part_under_another_name_says_so(tmp_path: Path, whole: Path) -> None:
    paths = split(whole, tmp_path)
    renamed = paths[0].rename(tmp_path / "model.gguf")
    with pytest.raises(CheckpointError, match=r"model\.gguf is one of 3 parts of a model; name the parts as they were"):
        GGUFParts(renamed)
    with pytest.raises(CheckpointError, match=r"is named as part 7 of 3; rename it"):
        GGUFParts(tmp_path / name(7))
    (tmp_path / name(1)).write_bytes(paths[1].read_bytes())
    with pytest.raises(CheckpointError, match=r"is not part 1 of 3 as its name says, but has split\.no = 1 and"):
        GGUFParts(tmp_path / name(1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"count": 2}, r"has split\.no = 0 and split\.count = 2; download it again"),
        ({"tensors": 99}, r"have 12 tensors, not the 99 that the model has; download them again"),
    ],
)
def test_parts_that_do_not_belong_together(tmp_path: Path, whole: Path, changes: dict[str, int], message: str) -> None:
    paths = split(whole, tmp_path, **changes)
    with pytest.raises(CheckpointError, match=message):
        GGUFParts(paths[0])


def test_a_tensor_in_two_parts(tmp_path: Path, whole: Path) -> None:
    paths = split(whole, tmp_path)
    content = bytearray(paths[0].read_bytes())
    at = content.index(b"split.no") + 12
    content[at : at + 2] = (1).to_bytes(2, "little")
    paths[1].write_bytes(content)
    with pytest.raises(CheckpointError, match=r"tensor .* is in both tiny-00001-of-00003\.gguf and tiny-00002"):
        GGUFParts(paths[0])


def test_a_whole_file_may_say_that_it_is_one_part(tmp_path: Path, whole: Path) -> None:
    only = write_gguf(tmp_path / "only.gguf", SPEC, TENSORS, keys={"split.no": 0, "split.count": 1})
    assert GGUFParts(only).shapes == GGUFFile(whole).shapes


def test_links_keep_their_names(tmp_path: Path, whole: Path) -> None:
    """The hub's cache keeps files under their checksums and links to them."""
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for path in split(whole, tmp_path):
        path.symlink_to(path.rename(blobs / path.stem.replace("-", "")))
    source = resolve_source(str(tmp_path / name(2)), cache_dir=None)
    assert source.name == "tiny"
    assert load_spec(source).num_layers == 1
