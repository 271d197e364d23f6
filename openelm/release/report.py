"""Write a run's report: one HTML file that opens from disk, asks the network for nothing, and trusts no text."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from openelm.data.manifest import Shard
from openelm.files.atomic import write_atomic
from openelm.release import charts, units
from openelm.release.changes import HELD_OUT_TEXT, Change, changes
from openelm.release.figures import EVENTS, health_figures, layers_figure, learning_figure, notable
from openelm.release.record import Corpus, Evaluation, Record, Score, read_run
from openelm.train.data_lists import LISTS

SAMPLES, SHARDS, DOCUMENTS, EVENT_ROWS = 12, 200, 200, 40
OPEN_DOCUMENTS = 8  # more than these are folded away
RESAMPLED = {"stretches": "stretches of about 4 KiB"}
SAMPLE_CHARACTERS = 2000


def write_report(run: Path, *, out: Path | None = None) -> Path:
    """Write the report of a run folder to `out` (`report.html` in the folder if not given) and return its path.

    The same folder always gives the same bytes. Parts of the folder that are not there yet are left out.

    Raises:
        CheckpointError: the folder is missing, or a file in it cannot be understood.
        DiskError: the page cannot be written.
    """
    path = out or run / "report.html"
    write_atomic(path, render(read_run(run)).encode(errors="replace"))  # a sample may hold half a character
    return path


def render(record: Record) -> str:
    """Return the page of a run as HTML."""
    style, script = _resource("report.css"), _resource("report.js")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(
        significant=units.significant, short=units.count, size=units.size, plural=units.plural, bits="{:.3f}".format
    )
    final = record.final
    score = final.bits_per_byte if final else None
    return environment.from_string(_resource("report.html.j2")).render(
        policy=_policy(style, script),
        style=Markup(style),
        script=Markup(script),
        record=record,
        run=record.run,
        name=record.run.name or record.folder.resolve().name,
        status=status(record),
        verdict=verdict(record),
        key_figures=list(_key_figures(record)),
        score=score,
        final=final,
        results=list(_results(final)) if final else [],
        documents=list(_documents(score, final)) if final and score else [],
        open_documents=OPEN_DOCUMENTS,
        interval_over=_interval_over(score) if score else "",
        changes=changes(record),
        tuned=bool(record.run.config.get("tune")),
        other_evaluations=_other_evaluations(record),
        learning=learning_figure(record, final.best_baseline if final else None),
        samples=units.spread(record.samples, SAMPLES),
        sample_characters=SAMPLE_CHARACTERS,
        health=health_figures(record),
        events=notable(record.events),
        event_words=EVENTS,
        event_rows=EVENT_ROWS,
        layers=layers_figure(record.run.plan, record.run.uniform_plan) if record.run.plan else None,
        corpora=[
            (title, corpus, _sources(corpus, record.files.get(key, {})), LISTS[key])
            for title, key, corpus in (
                ("Examples" if record.run.config.get("tune") else "Training text", "data", record.run.data),
                ("Held-out text", "held_out", record.run.held_out),
                ("Held-out examples", "held_out_examples", record.run.held_out_examples),
            )
            if corpus is not None
        ],
        shards=SHARDS,
        document_rows=DOCUMENTS,
        commands=commands(record),
        fingerprints=list(_fingerprints(record)),
        environment=sorted((key, _plain(value)) for key, value in record.run.environment.items()),
        settings=list(_settings(record.run.config)),
        model=list(_settings(record.run.model)),
        result=list(_settings(record.result)),
    )


def status(record: Record) -> str:
    """Say in a few words how far the run is."""
    ends = [event for event in record.events if event.event in ("start", "resume", "stop", "finish")]
    last = ends[-1].event if ends else "start"
    at = f"at step {record.last_step:,}"
    return {"finish": f"finished {at}", "stop": f"stopped {at}"}.get(last, f"not finished, {at}")


def verdict(record: Record) -> str:
    """Say in one sentence how good the model is, and never more than the interval allows."""
    parameters = record.run.parameters
    model = f"this model of {units.count(parameters)} parameters" if parameters else "this model"
    score = record.final.bits_per_byte if record.final else None
    if record.final is not None and score is not None:
        said = f"On text it never saw, {model} needs {score.value:.3f} bits per byte"
        if score.interval is not None:
            said += f" ({score.interval[0]:.3f} to {score.interval[1]:.3f}, {_interval_over(score)})"
        else:
            said += " (no interval)"
        return said + _comparison(score, record.final) + "."
    if record.run.config.get("tune"):
        return _tuned(record, model)
    if record.held_out:
        last = record.held_out[-1]
        return (
            f"After {units.plural(last.step, 'step')}, {model} needs {last.bits_per_byte:.3f} bits per byte on "
            "held-out text; there is no final evaluation yet."
        )
    if record.steps:
        return f"After {units.plural(record.last_step, 'step')}, {model} has not been scored on held-out text yet."
    return "The run has started; no step is recorded yet."


def _tuned(record: Record, model: str) -> str:
    """Say what tuning changed, the suites first; of what has no interval it says the numbers only."""
    found = changes(record)
    if not found:
        return f"After {units.plural(record.last_step, 'step')} of tuning, {model} has not been measured again yet."
    first = min(found, key=lambda change: (change.verdict == "", not change.more_is_better))
    texts = [change for change in found if change.name == HELD_OUT_TEXT and change is not first]
    said = "; ".join(map(_went, [first, *texts]))
    return f"After {units.plural(record.last_step, 'step')} of tuning, {said}."


def _went(change: Change) -> str:
    unit = " %" if change.unit == "%" else f" {change.unit}"
    told = {"": "", "cannot tell": ", which may be chance"}.get(change.verdict, f", which is {change.verdict}")
    digits = 3 if change.unit == "%" else 4
    before, after = units.significant(change.before, digits), units.significant(change.after, digits)
    return f"{change.name} went from {before} to {after}{unit}{told}"


def _interval_over(score: Score) -> str:
    over = RESAMPLED.get(score.interval_over, score.interval_over)
    return f"95 % interval over {over}" if over else "95 % interval"


def _comparison(score: Score, final: Evaluation) -> str:
    best = final.best_baseline
    if best is None:
        return "; there is no baseline to compare it with"
    named = f"the best baseline, {best.name} ({best.bits_per_byte:.3f})"
    low, high = score.interval or (score.value, score.value)
    if low <= best.bits_per_byte <= high:
        return f"; the interval includes {named}, so neither is shown to be better"
    difference = units.percent(abs(1 - score.value / best.bits_per_byte), 2)
    return f", {difference} {'fewer' if score.value < best.bits_per_byte else 'more'} than {named}"


def _key_figures(record: Record) -> Iterator[tuple[str, str, str]]:
    """Yield (label, value, remark) for what is known."""
    parameters, plan = record.run.parameters, record.run.plan
    tokens = record.steps[-1].tokens if record.steps else None
    if record.final is not None and (score := record.final.bits_per_byte) is not None:
        perplexity = f"perplexity {units.significant(score.perplexity, 3)}" if score.perplexity else ""
        yield "held-out bits per byte", f"{score.value:.3f}", perplexity
    elif record.held_out:
        last = record.held_out[-1]
        yield "held-out bits per byte", f"{last.bits_per_byte:.3f}", f"at step {last.step:,}"
    if parameters:
        yield "parameters", units.count(parameters), units.plural(len(plan.ffn_dims), "layer") if plan else ""
    if tokens:
        remark = f"{units.significant(tokens / parameters, 3)} per parameter" if parameters else ""
        yield "tokens seen", units.count(tokens), remark
    timed = [(line, line.seconds) for line in record.steps if line.seconds]
    if not timed:
        return
    whole = [event.seconds for event in record.events if event.event == "finish" and event.seconds]
    total = whole[-1] if whole else sum(seconds for _, seconds in timed)
    lost = sum(line.seconds or 0 for line in record.void_steps)
    yield "training time", units.duration(total), f"and {units.duration(lost)} repeated" if lost else ""
    rates = [(rate, seconds) for line, seconds in timed if (rate := line.tokens_per_second) is not None]
    if rates:
        yield "tokens per second", units.significant(_mean(rates), 3), "mean"
    shares = [(mfu, seconds) for line, seconds in timed if (mfu := line.mfu) is not None]
    if shares:
        yield "MFU", units.percent(_mean(shares)), "of the measured matmul rate"


def _mean(weighted: list[tuple[float, float]]) -> float:
    return sum(value * weight for value, weight in weighted) / sum(weight for _, weight in weighted)


def _results(final: Evaluation) -> Iterator[dict[str, Any]]:
    """Yield the model and its baselines, the best first."""
    score = final.bits_per_byte
    assert score is not None
    rows = [("this model", score.value, "", score.interval, "train")]
    rows += [(one.name, one.bits_per_byte, one.note, None, "baseline") for one in final.baselines]
    top = _longest_bar(final)
    for name, value, note, interval, style in sorted(rows, key=lambda row: row[1]):
        bar = charts.bar(value, top, style, interval)
        yield {"name": name, "value": value, "note": note, "interval": interval, "bar": bar, "style": style}


def _documents(score: Score, final: Evaluation) -> Iterator[dict[str, Any]]:
    """Yield the held-out documents, the easiest first, on the scale of the results."""
    top = _longest_bar(final)
    for one in sorted(score.per_document, key=lambda one: one.value):
        yield {"name": one.name, "value": one.value, "bytes": one.bytes, "bar": charts.bar(one.value, top, "train")}


def _longest_bar(final: Evaluation) -> float:
    """Return the largest number that the results show as a bar; they share one scale."""
    score = final.bits_per_byte
    assert score is not None
    shown = [score.value, score.high or 0.0, *(one.value for one in score.per_document)]
    return max(*shown, *(one.bits_per_byte for one in final.baselines)) or 1.0


def _other_evaluations(record: Record) -> list[tuple[str, int | None, Score]]:
    return [
        (name, evaluation.step, evaluation.bits_per_byte)
        for name, evaluation in record.evaluations.items()
        if name != "final.json" and evaluation.bits_per_byte is not None
    ]


def _sources(corpus: Corpus, files: Mapping[str, Sequence[Shard]]) -> list[dict[str, Any]]:
    total = sum(source.bytes for source in corpus.sources) or 1
    return [
        {
            **source.model_dump(),
            "shards": files.get(source.name, ()),
            "share": units.percent(source.bytes / total),
        }
        for source in corpus.sources
    ]


def _settings(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield nested settings as (dotted path, value)."""
    for key, inner in value.items():
        if isinstance(inner, dict) and inner:
            yield from _settings(inner, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", _plain(inner)


def commands(record: Record) -> list[str]:
    """Return the commands that train the same model again from `run.json`."""
    commit = re.fullmatch(r"([0-9a-f]{7,64})\+?", record.run.git_commit or "")  # people paste these lines
    checkout = [f"git checkout {commit[1]}"] if commit else []
    return [*checkout, "python -m pip install .", "openelm train run.json --out again", "openelm report again"]


def _fingerprints(record: Record) -> Iterator[tuple[str, str]]:
    run = record.run
    found = {
        "seed": None if run.seed is None else str(run.seed),
        "code": run.git_commit and run.git_commit.replace("+", ", with changes that were not committed"),
        "training text": run.data.sha256 if run.data else None,
        "held-out text": run.held_out.sha256 if run.held_out else None,
        "tokenizer": run.tokenizer.sha256 if run.tokenizer else None,
        "vocabulary": f"{run.tokenizer.vocab_size:,}" if run.tokenizer and run.tokenizer.vocab_size else None,
        **record.hashes,
        "final weights": str(record.result.get("final_weights_sha256", "")),
    }
    yield from ((key, value) for key, value in found.items() if value)


def _plain(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _policy(style: str, script: str) -> str:
    """Return a content security policy that allows exactly this style and this script, and no request."""
    hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (style, script)]
    return (
        f"default-src 'none'; style-src 'sha256-{hashes[0]}'; script-src 'sha256-{hashes[1]}'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )


def _resource(name: str) -> str:
    return resources.files("openelm.release").joinpath(name).read_text(encoding="utf-8")
