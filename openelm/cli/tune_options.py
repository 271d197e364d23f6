"""The options of `openelm tune`; imports nothing that reads models, so help is instant."""

from __future__ import annotations

import argparse

METHODS = ("sft", "dpo", "lora", "dora")
ADAPTERS = ("lora", "dora")
TUNE_EXAMPLE = (
    "openelm tune --method sft --model runs/demo/model --data chats.jsonl --out runs/chat\n"
    "  openelm tune --method lora --model MODEL --data train.jsonl --held-out test.jsonl --out runs/lora --epochs 2\n"
    "  openelm tune --method dpo --adapter lora --model runs/chat/model --data pairs.jsonl --out runs/preferred\n"
    "  openelm tune instruct-270m --model MODEL --data ultrafeedback/ --out runs/instruct"
)


def add_tune_options(parser: argparse.ArgumentParser) -> None:
    """Describe the options of `openelm tune`."""
    parser.add_argument(
        "recipe", nargs="?", help="a .toml file or a shipped recipe's name, such as instruct-270m or lora-commonsense"
    )
    parser.add_argument(
        "--method",
        choices=METHODS,
        help="in place of a recipe. sft: learn to give the answers; dpo: learn which of two answers is better; "
        "lora, dora: sft with an adapter",
    )
    parser.add_argument("--adapter", choices=ADAPTERS, help="train an adapter, with --method dpo too")
    parser.add_argument("--model", metavar="FOLDER", help="the model to begin with (sets tune.base)")
    parser.add_argument(
        "--data",
        nargs="+",
        metavar="PATH",
        help="examples, .jsonl(.gz/.zst), .json or .parquet: messages, ShareGPT's conversations, Alpaca's instruction "
        "and output, prompt and completion, or prompt, chosen and rejected",
    )
    parser.add_argument(
        "--held-out", nargs="+", metavar="PATH", help="examples to measure on, before and after: the first 256"
    )
    parser.add_argument("--text", nargs="+", metavar="PATH", help="held-out text: bits per byte, before and after")
    parser.add_argument(
        "--suite", nargs="+", metavar="SUITE", help="questions to answer before and after, as openelm eval --suite"
    )
    parser.add_argument("--epochs", type=float, metavar="N", help="how often each example is learned (tune.epochs)")
    parser.add_argument("--seed", type=int, help="order of examples, adapter's first weights (default: the recipe's)")
    parser.add_argument("--out", required=True, help="run folder; the same command resumes")
    parser.add_argument(
        "--allow-change",
        nargs="+",
        default=[],
        metavar="NAME",
        help="settings that may differ from the run that is gone on with, such as evaluation.every",
    )
