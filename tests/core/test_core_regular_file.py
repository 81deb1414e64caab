"""Files that are none: each is refused at once, whatever stands in a file's place."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

import pytest

from jaxserve.core.errors import CheckpointError
from jaxserve.core.json_file import MAX_DEPTH, nested_deeper, parse_object, read_object, read_optional_object
from jaxserve.core.regular_file import open_regular, read_optional, read_regular


def fifo(path: Path) -> None:
    os.mkfifo(path)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def loop(path: Path) -> None:
    path.symlink_to(path.name)


def dangling(path: Path) -> None:
    path.symlink_to("nothing")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (fifo, "it is not a regular file"),
        (device, "it is not a regular file"),
        (Path.mkdir, "Is a directory"),
        (loop, "Too many levels of symbolic links"),
        (dangling, "No such file or directory"),
    ],
)
def test_what_is_no_file_is_refused(tmp_path: Path, make: object, message: str) -> None:
    path = tmp_path / "config.json"
    make(path)  # type: ignore[operator]  # each takes a path
    for read in (open_regular, partial(read_regular, max_bytes=9), partial(read_optional, max_bytes=9)):
        with pytest.raises(OSError, match=message) as caught:
            read(path)
        assert caught.value.strerror
    with pytest.raises(CheckpointError, match=rf"config\.json cannot be read: {message}\.$"):
        read_object(path)
    with pytest.raises(CheckpointError, match=rf"config\.json cannot be read: {message}\.$"):
        read_optional_object(path)


def test_files_are_read(tmp_path: Path) -> None:
    file = tmp_path / "a"
    file.write_bytes(b"12345")
    (tmp_path / "link").symlink_to("a")
    assert read_regular(tmp_path / "link", max_bytes=5) == b"12345"
    assert read_optional(tmp_path / "absent", max_bytes=5) is None
    assert read_optional_object(tmp_path / "absent") == {}
    with pytest.raises(OSError, match="it has more than 4 bytes"):
        read_regular(file, max_bytes=4)
    with pytest.raises(OSError, match="null"):
        read_regular(tmp_path / "a\0b", max_bytes=4)


def test_depth_of_json_is_bounded() -> None:
    def nested(depth: int) -> bytes:
        return b'{"a":' * (depth - 1) + b"{}" + b"}" * (depth - 1)

    assert parse_object(nested(MAX_DEPTH), "x")
    for depth in (MAX_DEPTH + 1, 200, 100_000):
        with pytest.raises(CheckpointError, match=r"^x is (nested deeper|not valid JSON)"):
            parse_object(nested(depth), "x")
    assert not nested_deeper([[1], {"a": [2]}], 3)
    assert nested_deeper([[1], {"a": [2]}], 2)
    assert not nested_deeper("text", 0)
