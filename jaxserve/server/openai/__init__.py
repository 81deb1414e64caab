"""The HTTP API of OpenAI on top of any `Engine`."""
