"""`openelm inspect`: what a model is made of and what it costs."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from openelm.cli.screen import Screen
from openelm.errors import printable
from openelm.model.config import ModelConfig
from openelm.model.sizes import model_size


def inspect(arguments: argparse.Namespace) -> int:
    """Print a model's layers, parameters, FLOPs and cache size; of one that is there, what it holds and lacks."""
    found: dict[str, Any] = {}
    path = Path(arguments.what)
    if path.exists():
        from openelm.convert.convert import open_source
        from openelm.convert.describe import described

        with open_source(path) as source:
            config, found = source.config, described(source, hashes=arguments.hash)
    else:
        config = model_size(arguments.what)
    costs = _costs(config)
    if arguments.json:
        print(json.dumps(costs | found))
        return 0
    plan, console = config.plan, Screen()
    counts = f"{costs['parameters']:,} parameters ({costs['non_embedding_parameters']:,} in layers)"
    console.print(f"{printable(arguments.what)}: {counts}")
    console.print(f"width {plan.dim}, head size {plan.head_dim}, vocabulary {config.vocab_size:,}\n")
    widest = max(plan.ffn_dims)
    console.print("layer  query heads  KV heads  FFN width")
    for layer, (query, kv, ffn) in enumerate(zip(plan.query_heads, plan.kv_heads, plan.ffn_dims, strict=True)):
        bar = "█" * max(1, round(24 * ffn / widest))
        console.print(f"{layer:5}  {query:11}  {kv:8}  {ffn:9,}  {bar}")
    length = costs["length"]
    console.print(f"\ntraining  {costs['training_flops_per_token'] / 1e9:.3f} GFLOP a token at length {length:,}")
    console.print(f"decoding  {costs['decode_flops_per_token'] / 1e9:.3f} GFLOP a token at context {length:,}")
    console.print(f"KV cache  {costs['kv_bytes_per_token']:,} bytes a token at 2 bytes a number")
    for name, value in found.items():
        for line in value if isinstance(value, list) else [value]:
            console.print(f"{name:9} {line:,}" if isinstance(line, int) else f"{name:9} {line}")
    return 0


def _costs(config: ModelConfig) -> dict[str, Any]:
    plan, length = config.plan, config.max_context_length
    return {
        "plan": asdict(plan),
        "vocab_size": config.vocab_size,
        "parameters": config.parameters,
        "non_embedding_parameters": plan.non_embedding_parameters,
        "attention_parameters": plan.attention_parameters,
        "ffn_parameters": plan.ffn_parameters,
        "norm_parameters": plan.norm_parameters,
        "length": length,
        "forward_flops_per_token": plan.forward_flops_per_token(config.vocab_size, length),
        "training_flops_per_token": plan.training_flops_per_token(config.vocab_size, length),
        "decode_flops_per_token": plan.decode_flops_per_token(config.vocab_size, length),
        "kv_bytes_per_token": plan.kv_bytes_per_token(),
    }
