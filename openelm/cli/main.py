"""Parse the command, import only what it needs, and turn errors into one line and an exit code."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from openelm import __version__
from openelm.cli.adapter_options import add_adapter_actions
from openelm.cli.convert_options import (
    CONVERT_EXAMPLE,
    QUANTIZE_EXAMPLE,
    add_convert_options,
    add_push_options,
    add_quantize_options,
)
from openelm.cli.data_options import add_data_actions
from openelm.cli.evaluate_options import (
    COMPARE_EXAMPLE,
    EVALUATE_EXAMPLE,
    add_compare_options,
    add_evaluate_options,
)
from openelm.cli.sampling_options import add_generation_options, add_sampling_options
from openelm.cli.serve_options import SERVE_EXAMPLE, add_serve_options
from openelm.cli.table import TABLE_EXAMPLE, add_table_options
from openelm.cli.train_options import add_training
from openelm.cli.verbs import Verbs, add_overrides, verb
from openelm.convert.targets import TARGETS
from openelm.errors import OpenELMError
from openelm.release.numerics import adopt

_OVERRIDE = re.compile(r"[a-z_]+(\.[a-z_0-9]+)*=")

# verb: (module, function); torch is imported by these modules, never by `--help`.
_HANDLERS = {
    "adapter merge": ("adapter", "merge"),
    "adapter mlx": ("adapter", "mlx"),
    "demo": ("demo", "demo"),
    "train": ("train", "train_recipe"),
    "tune": ("tune", "tune"),
    "average": ("train", "average"),
    "report": ("train", "report"),
    "verify": ("verify", "verify"),
    "eval": ("evaluate", "evaluate"),
    "compare": ("evaluate", "compare"),
    "table": ("table", "table"),
    "inspect": ("models", "inspect"),
    "plan": ("plan", "plan"),
    "bench": ("bench", "bench"),
    "generate": ("talk", "generate"),
    "chat": ("talk", "chat"),
    "serve": ("serve", "serve"),
    "data manifest": ("data", "manifest"),
    "data merge": ("data", "merge"),
    "convert": ("convert", "convert"),
    "push": ("push", "push"),
    "quantize": ("quantize", "quantize"),
    "data check": ("data", "check"),
    "data decontaminate": ("clean", "decontaminate"),
    "data dedup": ("clean", "dedup"),
}
_EPILOG = """start here:
  openelm demo                                  text in, a talking model out, in about ten minutes on two cores
  openelm chat runs/demo/model                  talk with it
  openelm serve runs/demo/model                 the same in a browser, and for programs
  openelm train RECIPE.toml --out runs/mine     train your own; the same command resumes
  openelm inspect 1.1b                          shapes and costs of a published size

exit codes: 0 done, 2 usage or configuration, 3 bad input data, 4 damaged model or checkpoint, 5 disk,
6 numbers not finite, 7 verification failed, 75 stopped and resumable, 1 a bug (please report it)"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code. One of several processes ends here, with that code."""
    code = _run(arguments)
    if os.environ.get("WORLD_SIZE", "1") != "1":
        # PyTorch's caches hold the groups of a device mesh, and with them gloo's threads, after they were destroyed.
        # One that still holds a tensor while the interpreter ends aborts it (pytorch/pytorch, pull request 179291).
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):  # nobody reads any more
                stream.flush()
        os._exit(code)
    return code


def _run(arguments: Sequence[str] | None) -> int:
    parsed = parse_arguments(sys.argv[1:] if arguments is None else arguments)
    # Read by OpenMP when torch is loaded. Threads that wait for each other without end make a step five to twenty
    # times slower as soon as another program wants a core; with a short wait it is as fast and stays fast.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    if parsed.verb == "verify":
        adopt(Path(parsed.run))
    try:
        module, function = _HANDLERS[" ".join(filter(None, (parsed.verb, getattr(parsed, "action", None))))]
        handler: Callable[[argparse.Namespace], int] = getattr(
            importlib.import_module(f"openelm.cli.{module}"), function
        )
        return handler(parsed)
    except OpenELMError as error:
        print(f"openelm: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("openelm: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output has gone: `openelm … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse a command line; `path=value` words may stand anywhere, which argparse alone does not allow."""
    words, overrides = list(arguments), []
    if words and words[0] in ("demo", "train", "tune", "plan"):
        overrides = [word for word in words if _OVERRIDE.match(word)]
        words = [word for word in words if not _OVERRIDE.match(word)]
    parsed = build_parser().parse_args(words)
    parsed.overrides = overrides
    return parsed


def build_parser() -> argparse.ArgumentParser:
    """Describe every verb and option."""
    parser = argparse.ArgumentParser(
        prog="openelm",
        description="Train, check, adapt and run OpenELM: layer-wise scaled language models.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"openelm {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    _add_demo(verbs)
    add_training(verbs)
    _add_models(verbs)
    _add_convert(verbs)
    _add_plan(verbs)
    _add_bench(verbs)
    _add_talking(verbs)
    _add_data(verbs)
    add_adapter_actions(verbs)
    return parser


def _add_demo(verbs: Verbs) -> None:
    demo = verb(
        verbs,
        "demo",
        "raw text to a trained, evaluated, talking model, with a report",
        "openelm demo --text my-novels/ --out runs/novels",
    )
    demo.add_argument(
        "--text",
        nargs="+",
        metavar="PATH",
        help="your own text: files, folders or globs of .txt, .jsonl(.gz/.zst), .parquet (default: Shakespeare)",
    )
    demo.add_argument("--out", default="runs/demo", help="run folder; the same command resumes (default: %(default)s)")
    demo.add_argument("--seed", type=int, default=0, help="initial weights and document order (default: %(default)s)")
    demo.add_argument(
        "--export",
        nargs="+",
        default=[],
        choices=("all", *TARGETS),
        metavar="LAYOUT",
        help=f"convert the model too, to RUN/export/LAYOUT: all, or any of {', '.join(TARGETS)}",
    )
    demo.add_argument(
        "--compare-uniform",
        action="store_true",
        help="also train a model of equal size with all layers alike, and put it in the table (twice the time)",
    )
    add_overrides(demo)


def _add_models(verbs: Verbs) -> None:
    evaluate = verb(verbs, "eval", "measure a model on text or questions it has not seen", EVALUATE_EXAMPLE)
    add_evaluate_options(evaluate)
    _add_device(evaluate)
    compare = verb(verbs, "compare", "ask two models the same: better, worse, cannot tell", COMPARE_EXAMPLE)
    add_compare_options(compare)
    _add_device(compare)
    add_table_options(verb(verbs, "table", "show published scores, and yours among them", TABLE_EXAMPLE))
    inspect = verb(
        verbs,
        "inspect",
        "show the layers and exact costs of a size or a model, and what the model lacks",
        "openelm inspect 270m --json",
    )
    inspect.add_argument(
        "what", metavar="MODEL", help="a size (270m, 450m, 1.1b, 3b, …), a model folder, a .pt or a .gguf file"
    )
    inspect.add_argument("--hash", action="store_true", help="read all weights and print their SHA-256")
    inspect.add_argument("--json", action="store_true", help="print one JSON object")


def _add_convert(verbs: Verbs) -> None:
    add_convert_options(
        verb(verbs, "convert", "bring a model from any layout to any other, tensor by tensor", CONVERT_EXAMPLE)
    )
    add_quantize_options(
        verb(verbs, "quantize", "make a copy of a model folder with 4 or 8 bits a number", QUANTIZE_EXAMPLE)
    )
    add_push_options(
        verb(
            verbs,
            "push",
            "publish a model folder on the Hugging Face hub",
            "openelm push runs/demo/model you/tiny-openelm",
        )
    )


def _add_plan(verbs: Verbs) -> None:
    plan = verb(
        verbs,
        "plan",
        "say what a recipe needs on some devices: memory of each, tokens a second, days, cost",
        "openelm plan recipes/mine.toml --devices 8 --device h100 --price-per-hour 2.5",
    )
    plan.add_argument("recipe", nargs="?", help="a .toml file, a shipped recipe's name, or the run.json of a run")
    plan.add_argument("--devices", type=int, default=1, metavar="N", help="how many (default: %(default)s)")
    plan.add_argument(
        "--device",
        choices=("h100", "h200", "a100", "rtx-4090", "cpu"),
        default="h100",
        help="data sheet numbers; cpu: measured on this machine, in a second (default: %(default)s)",
    )
    plan.add_argument("--price-per-hour", type=float, metavar="X", help="of one device, in any currency")
    plan.add_argument(
        "--mfu", type=float, metavar="F", help="fraction of the peak that is reached (default: measured, nearest size)"
    )
    plan.add_argument("--vocab-size", type=int, metavar="N", help="ids of a tokenizer that is not here")
    plan.add_argument("--check", action="store_true", help="predict the runs that were measured, and print the errors")
    plan.add_argument("--json", action="store_true", help="print one JSON object (with --check: a list)")
    add_overrides(plan)


def _add_bench(verbs: Verbs) -> None:
    bench = verb(
        verbs,
        "bench",
        "measure what this machine can do at most, and what part of it the framework reaches",
        "openelm bench --case matmul train --size 5m --json\n\n"
        "cases (default: all, about a minute on two cores; what needs a ceiling measures it first):\n"
        "  matmul  products of matrices, through torch and through the model's own kernel\n"
        "  memory  bytes a second read and copied, in a buffer larger than the caches\n"
        "  disk    one file of --folder written, with fsync, and read past the cache\n"
        "  train   an update of the trainer; its ratio to matmul is the MFU\n"
        "  decode  tokens of the engine; its ratio to memory says how much of a token's time is reading weights\n"
        "  loader  tokens of the data stream, on one core; its ratio is to the bare tokenizer",
    )
    bench.add_argument(
        "--case",
        nargs="+",
        choices=("matmul", "memory", "disk", "train", "decode", "loader"),
        metavar="CASE",
        help="which ones, see below (default: all)",
    )
    bench.add_argument("--size", default="tiny", help="model of train and decode (default: %(default)s)")
    bench.add_argument("--rows", type=int, default=4, metavar="N", help="sequences a step (default: %(default)s)")
    bench.add_argument("--length", type=int, default=256, metavar="N", help="tokens each (default: %(default)s)")
    bench.add_argument(
        "--precision",
        choices=("auto", "fp32", "bf16"),
        default="auto",
        help="of train and decode; auto: bf16 where the device has units for it (default: %(default)s)",
    )
    _add_device(bench)
    bench.add_argument(
        "--repeats",
        type=int,
        default=5,
        metavar="N",
        help="the value is their median (default: %(default)s, the least)",
    )
    bench.add_argument("--threads", type=int, metavar="N", help="of the CPU (default: torch's, one a core)")
    bench.add_argument("--folder", default=".", help="where the disk is measured (default: the current one)")
    bench.add_argument("--disk-mib", type=int, default=128, metavar="N", help="size of its file (default: %(default)s)")
    bench.add_argument("--json", action="store_true", help="print one JSON line a measurement, as soon as it is known")


def _add_talking(verbs: Verbs) -> None:
    generate = verb(
        verbs,
        "generate",
        "continue a text",
        'openelm generate runs/demo/model --prompt "HAMLET.\\nTo be" --temperature 0.7 --seed 3',
    )
    generate.add_argument("model", help="model folder")
    generate.add_argument("--prompt", required=True, help="text to continue; - reads it from standard input")
    add_generation_options(generate)
    chat = verb(verbs, "chat", "talk with a model", "openelm chat runs/demo/model")
    chat.add_argument("model", help="model folder")
    chat.add_argument("--system", default="", help="instructions before the conversation (chat-tuned models)")
    for parser in (generate, chat):
        add_sampling_options(parser)
        _add_device(parser)
    serve = verb(verbs, "serve", "serve a model to programs (OpenAI's API) and browsers (a chat page)", SERVE_EXAMPLE)
    add_serve_options(serve)
    _add_device(serve)


def _add_data(verbs: Verbs) -> None:
    summary = "look after training text before a run: list it, check it, clean it"
    add_data_actions(verbs.add_parser("data", help=summary, description=summary[0].upper() + summary[1:] + "."))


def _add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="where to run (default: %(default)s)"
    )
