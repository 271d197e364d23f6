"""How fast a model trains and decodes here."""

from __future__ import annotations

import time

import torch

from openelm.bench.ceilings import DTYPES
from openelm.bench.measurement import Measurement, Progress, synchronize
from openelm.bench.step import Precision, fixed_batch, random_tokens, trainer, update
from openelm.generate.engine import generate
from openelm.generate.sampling import SamplingConfig
from openelm.model.config import ModelConfig
from openelm.model.transformer import OpenELM
from openelm.text.tokenizer import ByteTokenizer

PROMPT_TOKENS, DECODED_TOKENS = 64, 33


def measure_train(
    config: ModelConfig,
    rows: int,
    length: int,
    *,
    precision: Precision,
    device: torch.device,
    flops: Measurement,
    repeats: int,
    progress: Progress,
) -> Measurement:
    """Time updates of the trainer on one batch, after two untimed ones; `flops` is the measured ceiling."""
    updater = trainer(config, rows, length, precision=precision, device=device)
    batch = fixed_batch(random_tokens(config.vocab_size, rows, length))
    rates, losses = [], []
    for turn in range(-2, repeats):
        synchronize(device)
        began = time.perf_counter()
        losses.append(update(updater, batch))
        synchronize(device)
        if turn >= 0:
            rates.append(rows * length / (time.perf_counter() - began))
            progress("train", turn + 1, repeats)
    flops_per_token = config.plan.training_flops_per_token(config.vocab_size, length)
    settings = {
        "rows": rows,
        "length": length,
        "parameters": config.parameters,
        "flops_per_token": flops_per_token,
        "first_loss": losses[0].cross_entropy,
        "last_loss": losses[-1].cross_entropy,
    }
    return Measurement(
        "train", tuple(rates), "tokens/s", precision, 1e9 * flops.value / flops_per_token, flops.case, settings
    )


def measure_decode(
    config: ModelConfig,
    *,
    precision: Precision,
    device: torch.device,
    bandwidth: Measurement,
    repeats: int,
    progress: Progress,
) -> Measurement:
    """Time the engine's tokens after the first one, greedy, one sequence; weights are held in `precision`."""
    model = OpenELM(config)
    model.initialise(torch.Generator().manual_seed(0))
    model.to(device=device, dtype=DTYPES[precision])
    tokenizer = _AnyToken(config.vocab_size)
    prompt = random_tokens(config.vocab_size, 1, PROMPT_TOKENS - 1)[0].tolist()
    sampling = SamplingConfig(temperature=0, max_tokens=DECODED_TOKENS)
    rates = []
    for turn in range(-1, repeats):
        tokens = generate(model, tokenizer, prompt, sampling)
        next(tokens)  # the prompt
        began = time.perf_counter()
        count = sum(1 for _ in tokens)
        seconds = time.perf_counter() - began
        if turn >= 0:
            rates.append(count / seconds)
            progress("decode", turn + 1, repeats)
    number_bytes = DTYPES[precision].itemsize
    context_tokens = PROMPT_TOKENS + DECODED_TOKENS / 2
    token_bytes = config.parameters * number_bytes + config.plan.kv_bytes_per_token(number_bytes) * context_tokens
    settings = {
        "prompt_tokens": PROMPT_TOKENS,
        "decoded_tokens": DECODED_TOKENS - 1,
        "parameters": config.parameters,
        "bytes_per_token": token_bytes,
    }
    return Measurement(
        "decode", tuple(rates), "tokens/s", precision, 1e9 * bandwidth.value / token_bytes, bandwidth.case, settings
    )


class _AnyToken(ByteTokenizer):
    """Every id of a model stands for a dot, and none ends the text."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.vocab_size, self.eos_id, self._table = vocab_size, None, (b".",) * vocab_size
