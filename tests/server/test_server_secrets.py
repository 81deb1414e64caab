"""Keys and certificates from files: what is wrong with them is one sentence, and nobody is shown a key."""

from __future__ import annotations

import os
import ssl
from pathlib import Path

import httpx
import pytest
import trustme
from server_harness import COMPLETIONS, CONFIG, completion, live_server, make_app, make_engine

from jaxserve.core.config import ServeConfig, load
from jaxserve.core.errors import ConfigError
from jaxserve.server.keys import read_keys
from jaxserve.server.tls import tls_context


class TestKeys:
    def test_one_a_line(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        file = tmp_path / "keys"
        file.write_bytes("\ufeffone\r\n\n# a comment\n  two words \nschlüssel\none\n".encode())
        file.chmod(0o640)
        assert read_keys(file) == ("one", "two words", "schlüssel")
        assert caplog.messages == []

    def test_file_that_all_may_read(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        file = tmp_path / "keys"
        file.write_text("secret\n")
        file.chmod(0o644)
        assert read_keys(file) == ("secret",)
        [message] = caplog.messages
        assert "chmod o-r" in message
        assert "secret" not in caplog.text

    @pytest.mark.parametrize("content", [b"", b"\n# none\n\n", b"\xff\xfe\x00", b"x" * 2_000_000])
    def test_wrong_file(self, tmp_path: Path, content: bytes) -> None:
        """A file without a key must not open the server to all."""
        file = tmp_path / "keys"
        file.write_bytes(content)
        with pytest.raises(ConfigError, match=str(file)) as caught:
            read_keys(file)
        assert caught.value.param == "api_key_file"

    @pytest.mark.parametrize("kind", ["missing", "folder", "fifo"])
    def test_no_file(self, tmp_path: Path, kind: str) -> None:
        file = tmp_path / "keys"
        if kind == "folder":
            file.mkdir()
        elif kind == "fifo":
            os.mkfifo(file)
        with pytest.raises(ConfigError, match=str(file)):
            read_keys(file)

    def test_keys_are_not_shown(self) -> None:
        assert "hush" not in repr(load({"api_key": "hush"}, environ={}))
        assert "hush" not in repr(ServeConfig(api_key=("hush",)))
        assert "hush" not in repr(CONFIG.__class__(served_model_names=("m",), api_keys=("hush",)))


class TestTls:
    @pytest.fixture
    def authority(self) -> trustme.CA:
        return trustme.CA()

    @pytest.fixture
    def files(self, authority: trustme.CA, tmp_path: Path) -> tuple[Path, Path]:
        issued = authority.issue_cert("127.0.0.1", "localhost")
        cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
        issued.private_key_pem.write_to_path(key)
        for part in issued.cert_chain_pems:
            part.write_to_path(cert, append=True)
        return cert, key

    async def test_requests_and_streams(self, authority: trustme.CA, files: tuple[Path, Path]) -> None:
        trusting = ssl.create_default_context()
        authority.configure_trust(trusting)
        engine = make_engine()
        async with (
            live_server(make_app(engine), engine, tls=tls_context(*files)) as server,
            httpx.AsyncClient(base_url=server.url.replace("http:", "https:"), verify=trusting) as client,
        ):
            response = await client.post(COMPLETIONS, json=completion())
            assert response.json()["choices"][0]["text"] == "BCDE"
            response = await client.post(COMPLETIONS, json=completion(stream=True))
            assert response.text.endswith("data: [DONE]\n\n")
            async with httpx.AsyncClient() as plain:
                with pytest.raises(httpx.TransportError):
                    await plain.get(f"{server.url}/health")
            assert (await client.get("/health")).status_code == 200

    def test_none(self) -> None:
        assert tls_context(None, None) is None

    def test_both_or_neither(self, files: tuple[Path, Path]) -> None:
        cert, key = files
        for given in ((cert, None), (None, key)):
            with pytest.raises(ConfigError, match="both or neither"):
                tls_context(*given)

    @pytest.mark.parametrize("kind", ["missing", "folder", "fifo"])
    def test_no_file(self, files: tuple[Path, Path], kind: str) -> None:
        cert, key = files
        key.unlink()
        if kind == "folder":
            key.mkdir()
        elif kind == "fifo":
            os.mkfifo(key)
        with pytest.raises(ConfigError, match=str(key)) as caught:
            tls_context(cert, key)
        assert caught.value.param == "tls_key"

    def test_wrong_file(self, files: tuple[Path, Path]) -> None:
        cert, key = files
        with pytest.raises(ConfigError, match="not a certificate and its unencrypted key"):
            tls_context(key, cert)
        cert.write_text("no certificate")
        with pytest.raises(ConfigError, match="not a certificate and its unencrypted key"):
            tls_context(cert, key)

    def test_key_of_another(self, authority: trustme.CA, files: tuple[Path, Path]) -> None:
        authority.issue_cert("127.0.0.1").private_key_pem.write_to_path(files[1])
        with pytest.raises(ConfigError, match="not a certificate and its unencrypted key"):
            tls_context(*files)

    def test_encrypted_key_asks_nobody(self, files: tuple[Path, Path]) -> None:
        """OpenSSL would ask for the password on the terminal."""
        from cryptography.hazmat.primitives import serialization

        key = serialization.load_pem_private_key(files[1].read_bytes(), password=None)
        files[1].write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.BestAvailableEncryption(b"password"),
            )
        )
        with pytest.raises(ConfigError, match="unencrypted"):
            tls_context(*files)
