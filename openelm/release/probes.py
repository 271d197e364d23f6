"""What a run measures of itself: on held-out text while it trains, and the published model at its end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from openelm.data.document import Document
from openelm.data.manifest import Manifest
from openelm.data.reading import read_documents
from openelm.errors import DataError
from openelm.evaluate.score import Score, bits_per_byte
from openelm.generate.engine import generate, generate_text
from openelm.generate.sampling import SamplingConfig
from openelm.model.transformer import OpenELM
from openelm.release.answering import examples_probe, measures_at_start
from openelm.text.chat import Message, encode_chat, render
from openelm.text.tokenizer import Tokenizer
from openelm.train.loop import Probe
from openelm.train.run import Run
from openelm.train.update import Event
from openelm.train.work import HeldOut

_PROBED_DOCUMENTS = 64


def probes(run: Run, held_out: HeldOut | None = None, suites: Sequence[Probe] = ()) -> list[Probe]:
    """Make the measurements that a run takes while it trains.

    They are bits per byte of held-out text, the loss on held-out examples, suites, and a sample a prompt.

    Args:
        suites: what `suite_probes` made.
    """
    found = [held_out_probe(run)] if run.held_out is not None else []
    if held_out is not None:
        found.append(examples_probe(run, held_out))
    found += suites
    at_start = measures_at_start(run)
    samplers = [sampler(run, prompt) for prompt in run.config.evaluation.prompts]
    samplers += [answerer(run, question) for question in run.config.evaluation.questions]
    return found + [Probe(run.config.evaluation.every, measure, at_start) for measure in samplers]


def held_out_probe(run: Run) -> Probe:
    """Make the `evaluation` event: bits per byte of the beginnings of the held-out documents.

    Raises:
        DataError: the held-out files hold no text.
    """
    assert run.held_out is not None
    texts, names = zip(*_beginnings(run.held_out, run.config.evaluation.max_bytes), strict=True)

    def measure(model: OpenELM, step: int) -> Event:
        score = bits_per_byte(model, run.tokenizer, texts, names, window_tokens=run.config.train.length)
        return {"event": "evaluation", "bits_per_byte": score.value.hex(), "documents": score.documents}

    return Probe(run.config.evaluation.every, measure, measures_at_start(run))


def _beginnings(held_out: Manifest, max_bytes: int) -> list[tuple[str, str]]:
    """Take the beginnings of the held-out documents, alike long, up to `max_bytes` together."""
    documents = held_out_documents(held_out)
    if not documents:
        raise DataError("the held-out files hold no text", file=held_out.sources[0].shards[0].path, code="E_EMPTY")
    documents = documents[:_PROBED_DOCUMENTS]
    share = max(1, max_bytes // len(documents))
    return [
        (document.text.encode()[:share].decode(errors="ignore") or document.text[:1], Path(document.path).name)
        for document in documents
    ]


def sampler(run: Run, prompt: str) -> Callable[[OpenELM, int], Event]:
    """Make the `sample` event: what the model writes after a prompt."""

    def measure(model: OpenELM, step: int) -> Event:
        sampling = SamplingConfig(max_tokens=run.config.evaluation.sample_tokens, seed=run.config.train.seed)
        return {"event": "sample", "prompt": prompt, "text": generate_text(model, run.tokenizer, prompt, sampling)}

    return measure


def answerer(run: Run, question: str) -> Callable[[OpenELM, int], Event]:
    """Make the `sample` event of a question: the model's answer in the chat format, up to its end."""
    messages = [Message("user", question)]
    prompt, ids = render(messages, generation_prompt=True), encode_chat(run.tokenizer, messages)

    def measure(model: OpenELM, step: int) -> Event:
        sampling = SamplingConfig(max_tokens=run.config.evaluation.sample_tokens, seed=run.config.train.seed)
        text = "".join(token.text for token in generate(model, run.tokenizer, ids, sampling))
        return {"event": "sample", "question": question, "prompt": prompt, "text": text}

    return measure


def held_out_documents(held_out: Manifest) -> list[Document]:
    """Read the held-out documents whole."""
    return list(read_documents(held_out))


def final_score(model: OpenELM, tokenizer: Tokenizer, held_out: Manifest) -> Score:
    """Score a published model on the whole held-out text, at its whole context."""
    documents = held_out_documents(held_out)
    names = [Path(document.path).name + (f":{document.row}" if document.row else "") for document in documents]
    return bits_per_byte(model, tokenizer, [document.text for document in documents], names)
