"""`jaxserve chat`: talk to a model behind any OpenAI URL; answers stream in as they are made.

On a terminal it asks for lines and knows commands that begin with a slash. Without one, each line of standard input
is a message, and the answers alone go to standard output.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import httpx

    from jaxserve.cli.parsing import Commands

HELP = """\
/reset          forget the conversation
/system TEXT    set the system prompt and forget the conversation; without TEXT, remove it
/help           this list
/exit           leave (so does the end of input)"""


def add_command(commands: Commands) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        "chat",
        help="chat with a model behind any OpenAI URL",
        description="Chat with a model behind any OpenAI URL. Piped input is read one message a line. In a chat:\n"
        + HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="the server (default: %(default)s)")
    parser.add_argument("--model", help="which of the server's models (default: its first)")
    parser.add_argument("--api-key", help="key to present")
    parser.add_argument("--system", metavar="TEXT", help="system prompt")
    parser.add_argument("--temperature", type=float, help="0 is greedy (default: the server's)")
    parser.add_argument("--max-tokens", type=int, help="most tokens of an answer (default: the server's)")
    parser.add_argument("--seed", type=int, help="makes sampled answers reproducible")
    parser.add_argument(
        "--timeout", type=float, default=600.0, help="seconds to wait for the server (default: %(default)s)"
    )
    parser.set_defaults(run=run)


@dataclass(kw_only=True)
class Conversation:
    """What was said so far.

    Attributes:
        system: System prompt, or None to leave it to the model's template.
        messages: Turns of user and assistant.
    """

    system: str | None
    messages: list[dict[str, str]] = field(default_factory=list)

    def reset(self) -> None:
        """Forgets all but the system prompt."""
        self.messages.clear()

    def with_question(self, text: str) -> list[dict[str, str]]:
        """All messages, and a new one of the user."""
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [*system, *self.messages, {"role": "user", "content": text}]

    def add(self, question: str, answer: str) -> None:
        """Remembers a finished turn."""
        self.messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def run(arguments: argparse.Namespace) -> int:
    """Chats until the end of input."""
    import httpx

    from jaxserve.bench.openai_url import auth_headers, first_model, root_url

    interactive = sys.stdin.isatty() and sys.stdout.isatty()
    conversation = Conversation(system=arguments.system)
    options = {"temperature": arguments.temperature, "max_tokens": arguments.max_tokens, "seed": arguments.seed}
    with httpx.Client(
        base_url=root_url(arguments.url), headers=auth_headers(arguments.api_key), timeout=arguments.timeout
    ) as client:
        model = arguments.model or first_model(client)
        body = {"model": model, **{name: value for name, value in options.items() if value is not None}}
        if interactive:
            # Importing it gives `input` line editing and a history.
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401 - imported for that effect
            print(f"{model} at {arguments.url}; /help lists commands")
        failed = False
        for line in _lines(interactive):
            if line.startswith("/") and interactive:
                if not _command(line, conversation):
                    break
            else:
                try:
                    failed = not _turn(client, body, conversation, line) or failed
                except KeyboardInterrupt:
                    if not interactive:
                        raise
                    print(" (stopped)")
    return 1 if failed and not interactive else 0


def _lines(interactive: bool) -> Iterator[str]:
    """The user's lines that are not blank, until the end of input or an interrupt at the prompt."""
    while True:
        try:
            line = input("> " if interactive else "").strip()
        except EOFError:
            if interactive:
                print()
            return
        if line:
            yield line


def _command(line: str, conversation: Conversation) -> bool:
    """Obeys a slash command; False leaves."""
    name, _, rest = line.partition(" ")
    match name:
        case "/exit" | "/quit":
            return False
        case "/reset":
            conversation.reset()
            print("(forgotten)")
        case "/system":
            conversation.system = rest.strip() or None
            conversation.reset()
            print("(system prompt set)" if conversation.system else "(system prompt removed)")
        case _:
            print(HELP)
    return True


def _turn(client: httpx.Client, body: dict[str, object], conversation: Conversation, question: str) -> bool:
    """Asks and prints the answer as it comes; False if it failed. Only whole answers are remembered."""
    import httpx

    from jaxserve.core.errors import JaxserveError

    parts: list[str] = []
    ended = True
    try:
        for text in _answer(client, {**body, "messages": conversation.with_question(question), "stream": True}):
            parts.append(text)
            print(text, end="", flush=True)
    except httpx.HTTPError as error:
        ended = False
        print(f"jaxserve: {type(error).__name__}: {error}; is the server up?", file=sys.stderr)
    except JaxserveError as error:
        ended = False
        print(f"jaxserve: {error.message}", file=sys.stderr)
    print()
    if ended:
        conversation.add(question, "".join(parts))
    return ended


def _answer(client: httpx.Client, body: dict[str, object]) -> Iterator[str]:
    """The pieces of the answer's text."""
    from jaxserve.bench.openai_url import error_of, error_text
    from jaxserve.core.errors import JaxserveError

    with client.stream("POST", "/v1/chat/completions", json=body) as response:
        if response.status_code != 200:
            response.read()
            raise JaxserveError(error_of(response))
        for event in _events(response):
            if "error" in event:
                raise JaxserveError(error_text(event["error"]))
            for choice in event.get("choices", ()):
                if text := choice.get("delta", {}).get("content"):
                    yield text


def _events(response: httpx.Response) -> Iterator[dict[str, Any]]:
    """The events of the stream."""
    from jaxserve.bench.openai_url import sse_events
    from jaxserve.core.errors import JaxserveError

    pending = b""
    for chunk in response.iter_bytes():
        try:
            events, pending = sse_events(pending, chunk)
        except ValueError as error:
            raise JaxserveError("an event of the stream is not JSON") from error
        yield from events
