"""`docs/serving.md`: every setting of `jaxserve serve`, written from the table that declares them.

`python -m jaxserve.cli.settings_page docs/serving.md` writes it; a test fails while the page is stale.
"""

from __future__ import annotations

import sys
from dataclasses import fields
from pathlib import Path

from jaxserve.core.config import ServeConfig, default_text
from jaxserve.core.setting import boolean

_HEAD = """\
# Settings of `jaxserve serve`

Generated from `jaxserve/core/config.py` by `python -m jaxserve.cli.settings_page docs/serving.md`.

A setting `max_num_seqs` is the flag `--max-num-seqs`, the key `max_num_seqs` of the YAML file given with `--config`,
and the environment variable `JAXSERVE_MAX_NUM_SEQS`. Flags go before variables, variables before the file. A setting
that is true or false is the flags `--offline` and `--no-offline`, and `true` or `false` elsewhere. Unknown keys and
variables are errors; the variables that Kubernetes sets in every pod for a Service called `jaxserve` or `jaxserve-*`
(`JAXSERVE_SERVICE_HOST`, `JAXSERVE_PORT=tcp://...`) are passed over with a warning. `JAXSERVE_CACHE` moves the cache
directory of every command (default: `$XDG_CACHE_HOME/jaxserve`, else `~/.cache/jaxserve`). On a GPU, every command
tells JAX to take 95 % of the memory, of which `memory_fraction` is a share; `XLA_CLIENT_MEM_FRACTION` says otherwise.
Limits on clients, and who may use a server, are in [limits.md](limits.md).

    model: smollm2-135m
    port: 8000
    mesh: {tensor: 2}
    api_key: [first-key, second-key]

An API key may be followed by attributes: `KEY [name=NAME] [trusted] [priority=LOW..HIGH] [weight=N]`, as in
`--api-key "sk-1 name=team-a weight=2, sk-2 name=batch priority=0..100, sk-3 name=router trusted"`. Requests count
against the client that sent them: the key (keys of one name are one client), or without keys the address, of IPv6 the
/64. A trusted key speaks for others: its `x-llm-d-inference-fairness-id` header names the client, and its `cache_salt`
is taken as it comes. Where there are several keys, cached prefixes are not shared between them: neither the time of an
answer nor `cached_tokens` tells what others have asked. `X-Forwarded-For` and the fairness header of a keyless server
count from `trusted_proxies` only, and such a proxy must overwrite what its clients send in them.

| setting | default | what it is |
|---|---|---|
"""


def settings_page() -> str:
    """The page as Markdown."""
    rows = []
    for setting in fields(ServeConfig):
        default = default_text(setting)
        what = setting.metadata["help"].replace("|", "\\|")
        if setting.metadata["parse"] is boolean:
            flag = setting.name.replace("_", "-")
            what = f"{what} (`--{flag}`, `--no-{flag}`)"
        rows.append(f"| `{setting.name}` | {f'`{default}`' if default else 'none'} | {what} |")
    return _HEAD + "\n".join(rows) + "\n"


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(settings_page())
