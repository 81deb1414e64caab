"""HTTPS: a certificate chain and its key from files."""

from __future__ import annotations

import ssl
import stat
from pathlib import Path

from jaxserve.core.errors import ConfigError


def tls_context(cert: Path | None, key: Path | None) -> ssl.SSLContext | None:
    """What makes connections secure; None if no certificate is given.

    Args:
        cert: The server's certificate and those that it was signed with, in PEM.
        key: The certificate's private key in PEM, not encrypted.

    Raises:
        ConfigError: Only one of them is given, or they cannot be used.
    """
    if cert is None and key is None:
        return None
    if cert is None or key is None:
        raise ConfigError("tls_cert and tls_key belong together; give both or neither.", param="tls_key")
    _check_file(cert, "tls_cert")
    _check_file(key, "tls_key")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.set_alpn_protocols(["http/1.1"])
    try:
        # Without a password OpenSSL would ask for one on the terminal.
        context.load_cert_chain(cert, key, password=lambda: b"")
    except ssl.SSLError as error:
        raise ConfigError(
            f"{cert} and {key} are not a certificate and its unencrypted key in PEM ({error.reason or 'unreadable'}).",
            param="tls_cert",
        ) from error
    return context


def _check_file(file: Path, param: str) -> None:
    """OpenSSL's own errors do not say which of its files is at fault."""
    try:
        if not stat.S_ISREG(file.stat().st_mode):
            raise ConfigError(f"{file} is not a regular file.", param=param)
        file.open("rb").close()
    except OSError as error:
        raise ConfigError(f"Cannot read {file}: {error.strerror}.", param=param) from error
