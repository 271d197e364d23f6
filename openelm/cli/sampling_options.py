"""What `openelm generate` and `openelm chat` can be told about choosing tokens."""

from __future__ import annotations

import argparse


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """Add the controls of `SamplingConfig`, and what the text is constrained to."""
    options = parser.add_argument_group("sampling")
    options.add_argument("--temperature", type=float, help="0 is greedy (default: 0.8)")
    options.add_argument("--top-k", type=int, metavar="K", help="only the K likeliest tokens")
    options.add_argument("--top-p", type=float, metavar="P", help="only the likeliest tokens that sum to P")
    options.add_argument("--min-p", type=float, metavar="P", help="only tokens P times as likely as the likeliest")
    options.add_argument("--repetition-penalty", type=float, metavar="F", help="above 1: avoid tokens already seen")
    options.add_argument("--presence-penalty", type=float, metavar="X", help="-2 to 2: avoid tokens of the new text")
    options.add_argument("--frequency-penalty", type=float, metavar="X", help="the same for each time they were used")
    options.add_argument(
        "--logit-bias",
        action="append",
        metavar="ID=VALUE",
        help="-100 (never) to 100 (always) for one token; may be repeated",
    )
    options.add_argument("--max-tokens", type=int, metavar="N", help="stop after N tokens (default: 256)")
    options.add_argument("--stop", action="append", metavar="TEXT", help="stop before this text; may be repeated")
    options.add_argument("--seed", type=int, help="the same seed gives the same text (default: 0)")
    _add_constraint(parser)


def add_generation_options(parser: argparse.ArgumentParser) -> None:
    """Add what `openelm generate` alone has."""
    parser.add_argument(
        "--top-logprobs",
        type=int,
        metavar="N",
        help="afterwards, list each token's N likeliest rivals and their log-probabilities on standard error",
    )
    parser.add_argument(
        "--speculate",
        metavar="lookup|MODEL",
        help="guess tokens, from the text itself or by a smaller model; only the speed changes, not the text",
    )


def _add_constraint(parser: argparse.ArgumentParser) -> None:
    options = parser.add_argument_group("what the text may be, at most one of these (needs the extra `grammar`)")
    options.add_argument("--json-schema", metavar="FILE", help="JSON that this JSON Schema accepts; {} accepts any")
    options.add_argument("--regex", metavar="R", help="a match of this regular expression")
    options.add_argument(
        "--grammar", metavar="FILE", help="what this grammar, in Lark's EBNF, makes of its rule `start`"
    )
