"""Text from a model: sampling as pure functions, stop strings, the token loop, conversations."""
