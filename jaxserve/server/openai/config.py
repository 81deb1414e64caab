"""What the HTTP app is told when it is made; nothing else configures it."""

from __future__ import annotations

from dataclasses import dataclass, field

MAX_N = 128
"""Most sequences a prompt may ask for by default."""

MAX_PROMPTS = 1024
"""Most prompts a request may bring by default."""

MAX_SEQUENCES = 2048
"""Most sequences a request may ask for by default, over all its prompts."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AppConfig:
    """Settings of the OpenAI app.

    Attributes:
        served_model_names: Names a request may call the model by, at least one; answers use the one the request used.
        version: The server's version, shown by `/version`.
        api_keys: Keys of which a request must bring one; none means that no key is asked for.
        allowed_hosts: Hosts that requests may be for, as `hosts.hosts_of` gives them; None for all.
        allowed_origins: Origins whose web pages may use the API, `*` for all.
        max_body_bytes: Largest request body.
        max_n: Most sequences a prompt may ask for, by `n` or `best_of`.
        max_prompts: Most prompts a request may bring.
        max_sequences: Most sequences a request may ask for over all its prompts.
        request_timeout_s: Seconds after which a request is ended with an error; None means never.
    """

    served_model_names: tuple[str, ...]
    version: str = "0"
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    allowed_hosts: tuple[str, ...] | None = None
    allowed_origins: tuple[str, ...] = ()
    max_body_bytes: int = 16 * 2**20
    max_n: int = MAX_N
    max_prompts: int = MAX_PROMPTS
    max_sequences: int = MAX_SEQUENCES
    request_timeout_s: float | None = None
