"""Published numbers of OpenELM and of the models its paper compares with, in percent, each with its source.

Only what was read on the page that `source` names is here. The paper's tables give more of other models (the tasks
of Pythia, OPT, MobiLlama, OLMo and others); a row joins when its cells have been read there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from openelm.evaluate.presets import PRESETS

MODEL_CARD, PAPER, SECONDARY, CORENET = "model card", "paper, Table 1", "secondary", "CoreNet"
SOURCES = {
    MODEL_CARD: "https://huggingface.co/apple/OpenELM",
    PAPER: "https://arxiv.org/abs/2404.14619, which gives only the average there",
    SECONDARY: "a page about the paper, not the paper itself; only the average",
    CORENET: "https://github.com/apple/corenet/blob/main/projects/openelm/README-peft.md, with all tasks; "
    "the average is their mean",
}
"""What the `source` of a row means."""


@dataclass(frozen=True)
class PublishedRow:
    """A model in one suite.

    Attributes:
        suite: a key of PRESETS.
        parameters, tokens: sizes of the model and of its pre-training, as published; None where not stated.
        values: task -> percent; empty where only the average is known.
        average: the published one, percent.
        source: a key of SOURCES.
        note: how it was measured where the suite measures otherwise, by another metric then too; or None.
    """

    suite: str
    model: str
    parameters: int
    tokens: int | None
    values: Mapping[str, float]
    average: float | None
    source: str
    note: str | None = None

    @property
    def is_openelm(self) -> bool:
        """Tell OpenELM's own rows from those of other models."""
        return self.model.startswith("OpenELM")


# ARC-c, ARC-e, BoolQ, HellaSwag, PIQA, SciQ, WinoGrande, average
_ZERO_SHOT = {
    "270M": (26.45, 45.08, 53.98, 46.71, 69.75, 84.70, 53.91, 54.37),
    "270M-Instruct": (30.55, 46.68, 48.56, 52.07, 70.78, 84.40, 52.72, 55.11),
    "450M": (27.56, 48.06, 55.78, 53.97, 72.31, 87.20, 58.01, 57.56),
    "450M-Instruct": (30.38, 50.00, 60.37, 59.34, 72.63, 88.00, 58.96, 59.95),
    "1.1B": (32.34, 55.43, 63.58, 64.81, 75.57, 90.60, 61.72, 63.44),
    "1.1B-Instruct": (37.97, 52.23, 70.00, 71.20, 75.03, 89.30, 62.75, 65.50),
    "3B": (35.58, 59.89, 67.40, 72.44, 78.24, 92.70, 65.51, 67.39),
    "3B-Instruct": (39.42, 61.74, 68.17, 76.36, 79.00, 92.50, 66.85, 69.15),
}
# ARC-c, CrowS-Pairs, HellaSwag, MMLU, PIQA, RACE, TruthfulQA, WinoGrande, average of the eight, of OpenLLM's five
_FEW_SHOT = {
    "270M": (27.65, 66.79, 47.15, 25.72, 69.75, 30.91, 39.24, 53.83, 45.13, 38.72),
    "270M-Instruct": (32.51, 66.01, 51.58, 26.70, 70.78, 33.78, 38.72, 53.20, 46.66, 40.54),
    "450M": (30.20, 68.63, 53.86, 26.01, 72.31, 33.11, 40.18, 57.22, 47.69, 41.50),
    "450M-Instruct": (33.53, 67.44, 59.31, 25.41, 72.63, 36.84, 40.48, 58.33, 49.25, 43.41),
    "1.1B": (36.69, 71.74, 65.71, 27.05, 75.57, 36.46, 36.98, 63.22, 51.68, 45.93),
    "1.1B-Instruct": (41.55, 71.02, 71.83, 25.65, 75.03, 39.43, 45.95, 64.72, 54.40, 49.94),
    "3B": (42.24, 73.29, 73.28, 26.76, 78.24, 38.76, 34.98, 67.25, 54.35, 48.90),
    "3B-Instruct": (47.70, 72.33, 76.87, 24.80, 79.00, 38.47, 38.76, 67.96, 55.73, 51.22),
}
# ARC-c, ARC-e, BoolQ, HellaSwag, PIQA, SIQA, WinoGrande, OBQA, average
_COMMONSENSE_LORA = {"270M": (24.57, 26.60, 62.14, 24.84, 50.05, 42.02, 49.88, 28.00, 38.51)}
_COMMONSENSE_NOTE = (
    'asked with the prompts of LLM-Adapters ("the correct answer is ..."), and by the likelihoods of their answers'
)
_PARAMETERS = {"270M": 271_527_168, "450M": 457_179_136, "1.1B": 1_079_891_456, "3B": 3_036_647_424}
_TOKENS = 1_500_000_000_000  # the paper's Table 1, of 1.1B; all sizes share one recipe

_MILLION = 10**6
_OTHERS = tuple(
    PublishedRow(suite, model, millions * _MILLION, tokens_billions * 1000 * _MILLION, {}, average, source)
    for suite, model, millions, tokens_billions, average, source in (
        ("zero-shot", "OLMo", 1180, 3000, 62.16, SECONDARY),
        ("openllm", "OPT", 1300, 200, 41.49, PAPER),
        ("openllm", "Pythia", 1400, 300, 41.83, PAPER),
        ("openllm", "MobiLlama", 1300, 1300, 43.55, PAPER),
        ("openllm", "OLMo", 1200, 3000, 43.57, PAPER),
        ("llm360", "OLMo", 1180, 3000, 49.96, SECONDARY),
    )
)


def _openelm(suite: str, size: str, values: Mapping[str, float], average: float) -> PublishedRow:
    parameters = _PARAMETERS[size.removesuffix("-Instruct")]
    return PublishedRow(suite, f"OpenELM-{size}", parameters, _TOKENS, values, average, MODEL_CARD)


def _tasks(suite: str) -> list[str]:
    return [spec.task for spec in PRESETS[suite].tasks]


def _openelm_rows() -> list[PublishedRow]:
    rows = []
    for size, (*cells, average) in _ZERO_SHOT.items():
        rows.append(_openelm("zero-shot", size, dict(zip(_tasks("zero-shot"), cells, strict=True)), average))
    for size, (*cells, eight, five) in _FEW_SHOT.items():
        values = dict(zip(_tasks("llm360"), cells, strict=True))
        rows.append(_openelm("openllm", size, {task: values[task] for task in _tasks("openllm")}, five))
        rows.append(_openelm("llm360", size, values, eight))
    for size, (*cells, average) in _COMMONSENSE_LORA.items():
        values = dict(zip(_tasks("commonsense"), cells, strict=True))
        row = _openelm("commonsense", size, values, average)
        rows.append(replace(row, model=f"{row.model}-LoRA", source=CORENET, note=_COMMONSENSE_NOTE))
    return rows


PUBLISHED = (*_openelm_rows(), *_OTHERS)
"""OpenELM's rows from small to large, then the other models'."""
