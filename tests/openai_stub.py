"""A server with an OpenAI API that answers by rule and misbehaves on request, for tests of clients."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass(kw_only=True)
class Stub:
    """How the server behaves, and what it was sent.

    Attributes:
        tokenize: Whose `/tokenize` it has: "vllm", "llama.cpp", or None for neither.
        takes_ids: Whether prompts may be token ids.
        api_key: The key clients must present.
        fault: What goes wrong with completions: "status", "cut", "error", "short", "garbage", or None.
        fault_at: Which completion, counted from 0, goes wrong; None means all.
        delay_s: Pause before each piece.
        bodies: Bodies of the completions, in order of arrival.
        most_in_flight: Most completions at one time.
    """

    tokenize: str | None = "vllm"
    takes_ids: bool = True
    api_key: str | None = None
    fault: str | None = None
    fault_at: int | None = None
    delay_s: float = 0.0
    url: str = ""
    bodies: list[dict[str, Any]] = field(default_factory=list)
    most_in_flight: int = 0
    in_flight: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def arrived(self, body: dict[str, Any]) -> str | None:
        """Notes a completion; says what shall go wrong with it."""
        with self.lock:
            self.bodies.append(body)
            self.in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self.in_flight)
            return self.fault if self.fault_at in (None, len(self.bodies) - 1) else None


class _Server(ThreadingHTTPServer):
    def handle_error(self, *args: object) -> None:
        """A client that went away is what some tests are about."""


@contextmanager
def serving(stub: Stub) -> Iterator[Stub]:
    """Serves until the block ends; `stub.url` says where."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            """Says nothing."""

        def do_GET(self) -> None:
            self._json(200, {"data": [{"id": "stub-model"}]}) if self.path == "/v1/models" else self._json(404, {})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if stub.api_key is not None and self.headers["Authorization"] != f"Bearer {stub.api_key}":
                return self._json(401, {"error": {"message": "wrong key"}})
            if self.path == "/tokenize":
                return self._tokenize(body)
            if not stub.takes_ids and not isinstance(body.get("prompt", ""), str):
                return self._json(400, {"error": {"message": "prompt must be a string"}})
            if not body.get("stream"):
                return self._json(200, {"choices": [{"text": "A"}]})
            fault = stub.arrived(body)
            try:
                self._stream(body, fault)
            finally:
                with stub.lock:
                    stub.in_flight -= 1

        def _tokenize(self, body: dict[str, Any]) -> None:
            name = {"vllm": "prompt", "llama.cpp": "content"}.get(stub.tokenize or "")
            if name not in body:
                return self._json(404, {"error": {"message": "no such route"}})
            return self._json(200, {"tokens": [100 + i for i, _ in enumerate(body[name].split())]})

        def _stream(self, body: dict[str, Any], fault: str | None) -> None:
            if fault == "status":
                return self._json(503, {"error": {"message": "overloaded"}})
            is_chat = "messages" in body
            count = body.get("max_tokens") or 3
            self.send_response(200)
            self.end_headers()
            for i in range(count):
                time.sleep(stub.delay_s)
                text = f"t{i} "
                choice = {"delta": {"content": text}} if is_chat else {"text": text}
                self._event({"choices": [{**choice, "finish_reason": None}]})
                if i == 0 and fault in ("cut", "error", "garbage"):
                    if fault == "error":
                        self._event({"error": {"message": "device lost"}})
                    elif fault == "garbage":
                        self.wfile.write(b"data: {oops\n\n")
                    return None
            self._event({"choices": [{"text": "", "delta": {}, "finish_reason": "length"}]})
            prompt = body.get("prompt", "")
            num_prompt = len(prompt.split()) if isinstance(prompt, str) else len(prompt)
            usage = {"prompt_tokens": num_prompt, "completion_tokens": count - (fault == "short")}
            details = {"prompt_tokens_details": {"cached_tokens": 1}}
            self._event({"choices": [], "usage": {**usage, **details}})
            self.wfile.write(b"data: [DONE]\n\n")
            return None

        def _event(self, event: object) -> None:
            self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())

        def _json(self, status: int, body: object) -> None:
            data = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    server = _Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    stub.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield stub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
