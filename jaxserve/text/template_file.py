"""The file that an operator names as chat template."""

from __future__ import annotations

from pathlib import Path

from jaxserve.core.errors import ConfigError

MAX_FILE_BYTES = 1 << 20
"""Largest template file; the largest templates of models have some 30 KiB."""


def read_template(file: Path) -> str:
    """The template in a file.

    Args:
        file: A Jinja template in UTF-8.

    Raises:
        ConfigError: There is no such file, or it holds no text.
    """
    problem = None
    try:
        # A FIFO or a device would never end.
        if not file.is_file():
            problem = "is not a file" if file.exists() else "does not exist"
        elif file.stat().st_size > MAX_FILE_BYTES:
            problem = f"is larger than {MAX_FILE_BYTES >> 20} MiB"
        else:
            text = file.read_bytes().decode("utf-8-sig")
            if text.strip():
                return text
            problem = "is empty"
    except OSError as error:
        raise _unusable(file, f"cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise _unusable(file, "is not UTF-8") from error
    raise _unusable(file, problem)


def _unusable(file: Path, problem: str) -> ConfigError:
    return ConfigError(f"--chat-template {file} {problem}; name a Jinja template.", param="chat_template")
