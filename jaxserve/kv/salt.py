"""The cache salt that keeps users apart who must not learn from each other's prefixes.

A request whose prefix is cached is answered sooner, and its usage says how many tokens were found: whoever shares pages
with others can ask what they have asked. Pages are shared under equal salts only. Whoever authenticates a user makes
the salt here and passes it on as the request's `cache_salt`: the server for its own API keys, a router for those of the
fleet. A worker behind a router takes the salt as it comes.
"""

from __future__ import annotations

from hashlib import sha256


def effective_salt(key_id: str, cache_salt: str) -> str:
    """The salt under which a user's request shares pages.

    Args:
        key_id: Who the user is; empty where all users may share.
        cache_salt: The request's own salt, empty if it has none.

    Returns:
        Without `key_id` the request's own salt. Otherwise a text that no other pair gives, and that no user can hit
        upon with a salt of their own, for it is a hash of both.
    """
    if not key_id:
        return cache_salt
    digest = sha256()
    for part in (key_id, cache_salt):
        data = part.encode("utf-8", "surrogatepass")
        # With its length, so that ("a", "bc") and ("ab", "c") differ.
        digest.update(len(data).to_bytes(8, "big") + data)
    return f"key:{digest.hexdigest()}"
