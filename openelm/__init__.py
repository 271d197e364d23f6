"""OpenELM: train, check, adapt and run layer-wise scaled language models, and repeat them to the bit."""

__version__ = "0.1.0"
