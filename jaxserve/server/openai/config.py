"""What the HTTP app is told when it is made; nothing else configures it."""

from __future__ import annotations

from dataclasses import dataclass, field

from jaxserve.core.types import NO_DEFAULTS, SamplingDefaults

MIN_PRIORITY, MAX_PRIORITY = -10, 10
"""Bounds of a request's priority by default. A level is worth a minute of waiting: nobody gets ahead of those who ask
for nothing by more than ten."""

MAX_N = 128
"""Most sequences a prompt may ask for by default."""

MAX_PROMPTS = 1024
"""Most prompts a request may bring by default."""

MAX_SEQUENCES = 2048
"""Most sequences a request may ask for by default, over all its prompts."""

MAX_STOP_SEQUENCES = 1 << 16
"""Most stop strings times sequences of a request."""

MAX_ALLOWED_IDS = 1 << 21
"""Most entries of `allowed_token_ids` times sequences, since each sequence has its own loaded."""

MAX_PROMPT_LOGPROBS = 1 << 21
"""Most log-probabilities of prompt tokens and alternatives in an answer; they are some hundred megabytes of text."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CallerPolicy:
    """What callers may do, and what keeps them apart.

    Attributes:
        trusted_proxies: Addresses and networks that speak for others where no keys are asked for: their
            X-Forwarded-For and their fairness header are believed.
        min_priority: Lowest (most urgent) priority a request may have, at most 0.
        max_priority: Highest, at least 0.
        share_prefix_cache: Whether requests of different API keys share cached prefixes.
    """

    trusted_proxies: tuple[str, ...] = ()
    min_priority: int = MIN_PRIORITY
    max_priority: int = MAX_PRIORITY
    share_prefix_cache: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class AppConfig:
    """Settings of the OpenAI app.

    Attributes:
        served_model_names: Names a request may call the model by, at least one; answers use the one the request used.
        version: The server's version, shown by `/version`.
        api_keys: Keys of which a request must bring one, each with its attributes as `callers.parse_line` takes them;
            none means that no key is asked for.
        callers: What callers may do.
        allowed_hosts: Hosts that requests may be for, as `hosts.hosts_of` gives them; None for all.
        allowed_origins: Origins whose web pages may use the API, `*` for all.
        max_body_bytes: Largest request body.
        max_n: Most sequences a prompt may ask for, by `n` or `best_of`.
        max_prompts: Most prompts a request may bring.
        max_sequences: Most sequences a request may ask for over all its prompts.
        request_timeout_s: Seconds after which a request is ended with an error; None means never.
        sampling_defaults: Of requests that do not say.
    """

    served_model_names: tuple[str, ...]
    version: str = "0"
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    callers: CallerPolicy = CallerPolicy()
    allowed_hosts: tuple[str, ...] | None = None
    allowed_origins: tuple[str, ...] = ()
    max_body_bytes: int = 16 * 2**20
    max_n: int = MAX_N
    max_prompts: int = MAX_PROMPTS
    max_sequences: int = MAX_SEQUENCES
    request_timeout_s: float | None = None
    sampling_defaults: SamplingDefaults = NO_DEFAULTS
