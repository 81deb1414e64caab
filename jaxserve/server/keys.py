"""API keys from a file: one a line, so that they show neither in a list of processes nor in an environment."""

from __future__ import annotations

import logging
import stat
from pathlib import Path

from jaxserve.core.errors import ConfigError

_MAX_BYTES = 1 << 20
_LOG = logging.getLogger(__name__)


def read_keys(file: Path) -> tuple[str, ...]:
    """The keys in a file; blank lines and lines that begin with `#` are passed over.

    Args:
        file: A regular file in UTF-8.

    Raises:
        ConfigError: The file cannot be read or has no key; without one, the server would be open to all.
    """
    try:
        status = file.stat()
        if not stat.S_ISREG(status.st_mode) or status.st_size > _MAX_BYTES:
            raise _error(f"{file} is not a file of keys; give a regular file of at most 1 MiB.")
        text = file.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise _error(f"Cannot read the keys in {file}: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise _error(f"The keys in {file} are not UTF-8; write one a line.") from error
    if status.st_mode & stat.S_IROTH:
        _LOG.warning("every user of this machine can read the keys in %s; take that right away (chmod o-r)", file)
    lines = (line.strip() for line in text.splitlines())
    keys = tuple(dict.fromkeys(line for line in lines if line and not line.startswith("#")))
    if not keys:
        raise _error(f"There is no key in {file}; write one a line.")
    return keys


def _error(message: str) -> ConfigError:
    return ConfigError(message, param="api_key_file")
