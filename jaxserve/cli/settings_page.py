"""`docs/serving.md`: every setting of `jaxserve serve`, written from the table that declares them.

`python -m jaxserve.cli.settings_page docs/serving.md` writes it; a test fails while the page is stale.
"""

from __future__ import annotations

import sys
from dataclasses import fields
from pathlib import Path

from jaxserve.core.config import ServeConfig, default_text

_HEAD = """\
# Settings of `jaxserve serve`

Generated from `jaxserve/core/config.py` by `python -m jaxserve.cli.settings_page docs/serving.md`.

A setting `max_num_seqs` is the flag `--max-num-seqs`, the key `max_num_seqs` of the YAML file given with `--config`,
and the environment variable `JAXSERVE_MAX_NUM_SEQS`. Flags go before variables, variables before the file. Unknown keys
and variables are errors. `JAXSERVE_CACHE` moves the cache directory of every command (default:
`$XDG_CACHE_HOME/jaxserve`, else `~/.cache/jaxserve`). On a GPU, every command tells JAX to take 95 % of the
memory, of which `memory_fraction` is a share; `XLA_CLIENT_MEM_FRACTION` says otherwise. Limits on clients, and who may
use a server, are in [limits.md](limits.md).

    model: smollm2-135m
    port: 8000
    mesh: {tensor: 2}
    api_key: [first-key, second-key]

| setting | default | what it is |
|---|---|---|
"""


def settings_page() -> str:
    """The page as Markdown."""
    rows = []
    for setting in fields(ServeConfig):
        default = default_text(setting)
        what = setting.metadata["help"].replace("|", "\\|")
        rows.append(f"| `{setting.name}` | {f'`{default}`' if default else 'none'} | {what} |")
    return _HEAD + "\n".join(rows) + "\n"


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(settings_page())
