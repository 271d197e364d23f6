"""`openelm demo`: the whole path with one command, and again from where it was when it is interrupted."""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from openelm.cli.screen import Screen
from openelm.cli.train import find_recipe, print_run, publish_average, train_run
from openelm.config import apply_overrides, read_toml
from openelm.convert.convert import Options, check_installed, open_source, write
from openelm.convert.targets import TARGETS
from openelm.data.manifest import Manifest, SourceConfig, build_manifest
from openelm.data.reading import read_documents
from openelm.errors import DataError, printable
from openelm.evaluate.baselines import Baseline, baselines
from openelm.evaluate.score import Score
from openelm.evaluate.tables import aligned
from openelm.files.atomic import make_folder
from openelm.files.locks import folder_lock
from openelm.files.published import publish_folder
from openelm.generate.engine import generate_text
from openelm.generate.sampling import SamplingConfig
from openelm.model.folder import load_model, weights_sha256, write_json
from openelm.release.probes import final_score, held_out_documents
from openelm.release.report import write_report
from openelm.text.tokenizer import train_tokenizer
from openelm.train.ledger import read_ledger, valid_events
from openelm.train.run import Run, RunConfig, open_run

_HELD_OUT_EVERY = 20  # of the user's own documents, one in this many is kept for the evaluation
_DOCUMENT_BYTES = 16_384
_AVERAGED = 5
_PAGES = {"hf": "huggingface", "mlx": "mlx", "gguf": "gguf", "onnx": "onnx", "corenet": "convert"}
_VOCABULARIES, _RICH_CHARACTERS = (4096, 1024, 512, 384, 320, 288), 1_000_000


def demo(arguments: argparse.Namespace) -> int:
    """Run every stage that is not done yet and print what came of it."""
    console, folder = Screen(), Path(arguments.out)
    layouts = list(TARGETS) if "all" in arguments.export else list(dict.fromkeys(arguments.export))
    for layout in layouts:
        check_installed(layout)
    make_folder(folder)
    with folder_lock(folder):
        config = _demo_config(arguments, folder)
        run = _open(folder, config, console)
        train_run(run, console)
        console.print("\naveraging the last checkpoints and measuring on held-out documents …", style="dim")
        score, rows = _score_average(run), _baselines(run)
        if arguments.compare_uniform:
            rows.append(_uniform_baseline(arguments, console))
        _publish(run, score, rows)
        for layout in layouts:
            _export(run.folder, layout)
        _show(run, score, rows, console)
        for layout in layouts:
            console.print(f"  {printable(str(folder))}/export/{layout}: docs/{_PAGES[layout]}.md says what reads it")
    return 0


def _export(folder: Path, layout: str) -> None:
    """Write the published model in another layout; what an earlier call wrote is replaced."""
    with open_source(folder / "model") as source:
        write(source, folder / "export" / layout, Options(to=layout, replace=True))


def _demo_config(arguments: argparse.Namespace, folder: Path, **model: str) -> RunConfig:
    recipe = find_recipe("demo")
    values = apply_overrides(read_toml(recipe), [f"train.seed={arguments.seed}"])
    values["model"] |= model
    if arguments.text:
        values |= _own_text(arguments.text, folder.parent if model else folder, values)
    return RunConfig.parse(apply_overrides(values, arguments.overrides), file=recipe)


def _own_text(paths: Sequence[str], folder: Path, values: dict[str, Any]) -> dict[str, Any]:
    """Split the user's documents into two files of the run folder, and point the recipe at them."""
    split = folder / "text"
    source = SourceConfig.parse({"name": "your text", "paths": list(paths), "document_bytes": _DOCUMENT_BYTES})
    manifest = build_manifest([source])
    if not split.exists():
        _split_documents(manifest, split)
    if json.loads((split / "origin.json").read_bytes())["sha256"] != manifest.sha256:
        raise DataError(
            "this folder holds a run on other text", file=folder, fix="choose another --out", code="E_CHANGED"
        )
    with (split / "train.jsonl").open(encoding="utf-8") as file:
        vocab_size = _vocabulary([json.loads(line)["text"] for line in file])
    with (split / "held-out.jsonl").open(encoding="utf-8") as file:
        prompt = json.loads(file.readline())["text"][:40]
    return {
        "tokenizer": {"vocab_size": vocab_size},
        "data": {**values["data"], "sources": [{"name": "your text", "paths": [str(split / "train.jsonl")]}]},
        "held_out": [{"name": "held-out documents", "paths": [str(split / "held-out.jsonl")]}],
        "evaluation": {**values["evaluation"], "prompts": [prompt]},
    }


def _vocabulary(texts: Sequence[str]) -> int:
    """Choose the largest of a few vocabulary sizes that the text is rich enough for."""
    if sum(map(len, texts)) >= _RICH_CHARACTERS:
        return _VOCABULARIES[0]
    for vocab_size in _VOCABULARIES[1:-1]:
        try:
            return train_tokenizer(texts, vocab_size).vocab_size
        except DataError:
            continue
    return _VOCABULARIES[-1]


def _split_documents(manifest: Manifest, split: Path) -> None:
    """Put one document in twenty aside, chosen by the hash of its text; long text files are cut at blank lines.

    Raises:
        DataError: there are too few documents to keep one for the evaluation.
    """
    texts = list(dict.fromkeys(document.text for document in read_documents(manifest)))
    if len(texts) < 2:
        raise DataError(
            f"the text makes {len(texts)} document, equal ones counted once; two are needed",
            file=manifest.sources[0].shards[0].path,
            fix="give more text; files are cut at blank lines every 16 KiB",
        )
    ranked = sorted(texts, key=lambda text: hashlib.sha256(text.encode()).digest())
    kept = set(ranked[: max(1, len(texts) // _HELD_OUT_EVERY)])
    with publish_folder(split) as temporary:
        write_json(temporary / "origin.json", manifest.summary())
        for name, wanted in (("train.jsonl", False), ("held-out.jsonl", True)):
            with (temporary / name).open("w", encoding="utf-8") as file:
                file.writelines(json.dumps({"text": text}) + "\n" for text in texts if (text in kept) is wanted)


def _open(folder: Path, config: RunConfig, console: Console) -> Run:
    if not (folder / "tokenizer").exists():
        console.print("reading the text and training a tokenizer …", style="dim")
    run = open_run(folder, config)
    print_run(run, console)
    return run


def _score_average(run: Run) -> Score:
    """Average the last checkpoints into the model folder and score the mean on the whole held-out text."""
    publish_average(run.folder, _averaged(run), run.folder / "model")
    assert run.held_out is not None
    return final_score(load_model(run.folder / "model"), run.tokenizer, run.held_out)


def _baselines(run: Run) -> list[Baseline]:
    training = [document.text for document in read_documents(run.manifest, on_bad_row=run.config.data.on_bad_row)]
    assert run.held_out is not None
    return baselines([document.text for document in held_out_documents(run.held_out)], training, run.tokenizer)


def _averaged(run: Run) -> int:
    """Average five checkpoints, or as many as a shortened run has."""
    every, steps = run.config.checkpoints.every, run.config.train.steps
    return min(_AVERAGED, run.config.checkpoints.keep_last, -(-steps // every))


def _uniform_baseline(arguments: argparse.Namespace, console: Console) -> Baseline:
    """Train the model of equal size whose layers are all alike, on the same batches, and score it the same way."""
    folder = Path(arguments.out) / "uniform"
    make_folder(folder)
    with folder_lock(folder):
        run = _open(folder, _demo_config(arguments, folder, rule="uniform"), console)
        train_run(run, console)
        score = _score_average(run)
    return Baseline("uniform layers", score.value, f"{run.model_config.parameters:,} parameters, every layer alike")


def _publish(run: Run, score: Score, rows: Sequence[Baseline]) -> None:
    make_folder(run.folder / "eval")
    table = [{"name": row.name, "bits_per_byte": row.bits_per_byte, "note": row.description} for row in rows]
    step = run.config.train.steps
    write_json(run.folder / "eval" / "final.json", {"step": step, "bits_per_byte": score.to_json(), "baselines": table})
    publish_average(run.folder, _averaged(run), run.folder / "model")  # again, with the scores on its card
    events = valid_events(read_ledger(run.ledger_path))
    steps = [event for event in events if event["event"] == "step"]
    busy_seconds = sum(event["seconds"] for event in steps)
    write_json(
        run.folder / "result.json",
        {
            "parameters": run.model_config.parameters,
            "train_seconds": round(max(event.get("seconds", 0.0) for event in events if event["event"] == "finish"), 3),
            "tokens_per_second": round(steps[-1]["tokens"] / busy_seconds, 1),
            "mfu": round(sum(event["mfu"] * event["seconds"] for event in steps) / busy_seconds, 4),
            "held_out_bits_per_byte": {
                "value": score.value,
                "low": score.low,
                "high": score.high,
                "documents": score.documents,
                "interval_over": score.interval_over,
            },
            "baselines": table,
            "final_weights_sha256": weights_sha256(load_model(run.folder / "model").state_dict()),
            "model_folder": str(run.folder / "model"),
            "seed": run.config.train.seed,
            "precision": run.precision,
        },
    )
    write_report(run.folder)


def _show(run: Run, score: Score, rows: Sequence[Baseline], console: Console) -> None:
    table = [*((row.name, row.bits_per_byte, row.description) for row in rows), ("this model", score.value, "")]
    console.print()
    console.print(aligned(("held-out text", "bits/byte", ""), table))
    model = load_model(run.folder / "model")
    for prompt in run.config.evaluation.prompts[:1]:
        sampling = SamplingConfig(max_tokens=120, seed=run.config.train.seed)
        text = prompt + generate_text(model, run.tokenizer, prompt, sampling)
        console.print("\n".join(f"  {line}" for line in text.splitlines()), style="italic")
    console.print("\ntry next", style="bold")
    folder = printable(str(run.folder))
    console.print(f"  openelm chat {folder}/model")
    prompt = json.dumps(run.config.evaluation.prompts[0] if run.config.evaluation.prompts else "Once")
    console.print(f"  openelm generate {folder}/model --prompt {prompt} --temperature 0.7")
    console.print(f"  open {folder}/report.html in a browser")
