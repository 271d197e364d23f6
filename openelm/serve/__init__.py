"""The OpenAI-compatible server: HTTP in front, one engine in a thread of its own behind it."""
