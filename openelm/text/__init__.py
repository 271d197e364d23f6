"""Text to token ids and back: tokenizers, their training, streaming output, chat messages."""
