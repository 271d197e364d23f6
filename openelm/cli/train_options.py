"""The options of the verbs that train and check a training; imports nothing that reads models."""

from __future__ import annotations

from openelm.cli.tune_options import TUNE_EXAMPLE, add_tune_options
from openelm.cli.verbs import Verbs, add_overrides, verb


def add_training(verbs: Verbs) -> None:
    """Describe `train`, `tune`, `average`, `report` and `verify`."""
    train = verb(
        verbs,
        "train",
        "train a recipe, or go on with a run that was stopped",
        "openelm train recipes/mine.toml --out runs/mine train.steps=2000 schedule.peak=0.003",
    )
    train.add_argument("recipe", help="a .toml file, a shipped recipe's name, or the run.json of a run to repeat")
    train.add_argument("--out", required=True, help="run folder; the same command resumes")
    train.add_argument(
        "--allow-change",
        action="append",
        default=[],
        metavar="NAME",
        help="a setting that may differ from the run's earlier start, such as train.steps or environment.torch",
    )
    add_overrides(train)
    tune = verb(verbs, "tune", "teach a trained model with examples: instructions, preferences, adapters", TUNE_EXAMPLE)
    add_tune_options(tune)
    add_overrides(tune)
    average = verb(
        verbs, "average", "average a run's last checkpoints into a model folder", "openelm average runs/mine --last 5"
    )
    average.add_argument("run", help="run folder")
    average.add_argument("--last", type=int, default=5, help="checkpoints to average (default: %(default)s)")
    average.add_argument("--out", help="model folder (default: RUN/model, or RUN/adapter of a run that trains one)")
    report = verb(verbs, "report", "write a run's report page", "openelm report runs/mine")
    report.add_argument("run", help="run folder, finished or not")
    report.add_argument("--out", help="page to write (default: RUN/report.html)")
    _add_verify(verbs)


def _add_verify(verbs: Verbs) -> None:
    verify = verb(
        verbs,
        "verify",
        "check a run that somebody published: files, scores, batches, and training itself, to the bit",
        "openelm verify runs/theirs --level 4 --data /their/text=/my/text\n\n"
        "levels, each with the ones before it:\n"
        "  0  files: chain of the ledger, hashes, settings, the published mean\n"
        "  1  scores: held-out bits per byte measured again from the published weights\n"
        "  2  batches: derived again from your own copy of the data\n"
        "  3  segments: the mandatory stretches of training and random ones done again\n"
        "  4  everything done again from the seed, the tokenizer too",
    )
    verify.add_argument("run", help="run folder; nothing is written to it and nothing in it is executed")
    verify.add_argument("--level", type=int, choices=range(5), default=3, help="how far to go (default: %(default)s)")
    verify.add_argument(
        "--segments",
        type=int,
        default=2,
        metavar="N",
        help="random segments besides the mandatory ones (default: %(default)s)",
    )
    verify.add_argument("--seed", type=int, help="draws the random segments (default: a new one each time, printed)")
    verify.add_argument(
        "--data",
        action="append",
        default=[],
        metavar="OLD=NEW",
        help="where your copy of the data is: OLD is how its path begins in run.json or data.json; may be repeated",
    )
    verify.add_argument("--json", action="store_true", help="print one JSON object")
