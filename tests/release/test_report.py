"""The report page: complete, honest, self-contained, and safe to open whatever the run wrote."""

from __future__ import annotations

import base64
import hashlib
import json
import math
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

from openelm.data.blocks import Blocks
from openelm.data.manifest import Shard, Source
from openelm.data.manifest_file import Survey, write_manifest_file
from openelm.errors import CheckpointError
from openelm.release.record import read_run
from openelm.release.report import commands, render, verdict, write_report
from openelm.train.ledger import Ledger

HOSTILE = ['<script>alert("x")</script>', '"><img src=https://example.org/x onerror=alert(1)>', "</style>{{ 7 * 7 }}"]
WIDTHS = {"query_heads": [2, 4], "kv_heads": [1, 2], "ffn_dims": [64, 128]}
VOID_LOSS, SOUND_LOSS = 7.25, 2.5  # nats per token


class Page(HTMLParser):
    """The elements, links and visible text of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.blocks: dict[str, str] = {}
        self.text = ""
        self._inside = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside = tag

    def handle_data(self, data: str) -> None:
        if self._inside in ("style", "script"):
            self.blocks[self._inside] = self.blocks.get(self._inside, "") + data
        else:
            self.text += data

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def csv(self, name: str) -> list[list[str]]:
        """The rows behind a chart, without their header."""
        (href,) = [attrs["href"] for _, attrs in self.tags if attrs.get("download") == f"{name}.csv"]
        assert href is not None
        return [line.split(",") for line in unquote(href.partition(",")[2]).split("\n")[1:]]


def step(number: int, loss: float = SOUND_LOSS, **other: Any) -> dict[str, Any]:
    return {
        "event": "step",
        "step": number,
        "tokens": 1024 * number,
        "target_tokens": 1000,
        "target_bytes": 4000,
        "loss": loss.hex(),
        "gradient_norm": (0.5).hex(),
        "learning_rate": (3e-3 / number).hex(),
        "seconds": 2.0,
        "tokens_per_second": 512.0,
        "mfu": 0.25,
        **other,
    }


def corpus(name: str) -> dict[str, Any]:
    return {"sources": [{"name": name, "files": 1, "rows": 3, "bytes": 5000, "weight": 1.0}], "sha256": "cd" * 32}


def write_list(path: Path, name: str) -> None:
    shard = Shard(f"/texts/{name}.txt", f"{name}.txt", "txt", 5000, 0, "ab" * 32, 3, Blocks([[0, 3, 0, 0, 5000]]))
    write_manifest_file(path, [Survey(Source(name, (shard,)), "auto", "error", 1 << 20, 1, "")])


RUN = {
    "config": {"train": {"steps": 6, "rows": 4}, "optimizer": {"beta2": 0.99}},
    "model": {"vocab_size": 320, "head_dim": 16},
    "plan": {"dim": 64, "head_dim": 16, **WIDTHS},
    "uniform_plan": {"dim": 64, "head_dim": 16, "query_heads": [3, 3], "kv_heads": [1, 1], "ffn_dims": [96, 96]},
    "parameters": 2_086_112,
    "data": corpus("plays"),
    "held_out": corpus("kept-plays"),
    "tokenizer": {"vocab_size": 320, "sha256": "ef" * 32},
    "environment": {"torch": "2.13.0", "device": "cpu"},
    "seed": 17,
    "git_commit": "0123456789abcdef+",
    "a key of a later version": True,
}
LEDGER = [
    {"event": "start", "step": 0},
    *(step(number) for number in (1, 2, 3)),
    *(step(number, VOID_LOSS) for number in (4, 5)),
    {"event": "evaluation", "step": 5, "bits_per_byte": (6.125).hex(), "documents": 2},
    {"event": "sample", "step": 5, "prompt": "VOID.", "text": "a void sample"},
    {"event": "rewind", "step": 5, "to": 3},
    {"event": "resume", "step": 3},
    step(4),
    {"event": "skip", "step": 5, "reason": "nonfinite"},
    step(5, math.nan),
    step(6, 2.0),
    {"event": "evaluation", "step": 6, "bits_per_byte": (1.875).hex(), "documents": 2},
    {"event": "sample", "step": 6, "prompt": "HAMLET.", "text": "To be"},
    {"event": "finish", "step": 6, "seconds": 75.0},
]
FINAL = {
    "step": 6,
    "bits_per_byte": {
        "value": 1.75,
        "low": 1.5,
        "high": 2.0,
        "documents": 2,
        "bytes": 8000,
        "tokens": 2500,
        "perplexity": 48.5,
        "interval_over": "stretches",
        "per_document": [{"name": "hamlet.txt", "bits_per_byte": 1.625, "bytes": 5000, "nats": 1.0}],
    },
    "baselines": [
        {"name": "xz -9", "bits_per_byte": 2.998, "note": "alone"},
        {"name": "byte 6-grams", "bits_per_byte": 2.5, "note": ""},
    ],
}


def make_run(folder: Path, *, run: Any = RUN, ledger: Any = LEDGER, final: Any = FINAL) -> Path:
    folder.mkdir(exist_ok=True)
    if run is not None:
        (folder / "run.json").write_text(json.dumps(run))
        if "data" in run:
            write_list(folder / "data.json", run["data"]["sources"][0]["name"])
    if ledger is not None:
        with Ledger(folder / "ledger.jsonl") as file:
            for event in ledger:
                file.append(event)
    if final is not None:
        (folder / "eval").mkdir(exist_ok=True)
        (folder / "eval" / "final.json").write_text(json.dumps(final))
    return folder


def page_of(folder: Path) -> Page:
    return Page(render(read_run(folder)))


def test_the_report_goes_into_the_run_folder_unless_told_otherwise(tmp_path):
    run = make_run(tmp_path / "run")
    assert write_report(run) == run / "report.html"
    elsewhere = write_report(run, out=tmp_path / "page.html")
    assert elsewhere.read_bytes() == (run / "report.html").read_bytes()


def test_the_page_refers_to_nothing_outside_itself(tmp_path):
    page = page_of(make_run(tmp_path))
    links = [attrs[name] for _, attrs in page.tags for name in ("src", "href", "action", "data") if name in attrs]
    assert links and all(link and link.startswith(("data:", "#")) for link in links)
    assert not {"iframe", "img", "object", "embed", "base", "form"} & {tag for tag, _ in page.tags}
    assert "url(" not in page.blocks["style"] and "@import" not in page.blocks["style"]


def test_the_policy_allows_exactly_the_pages_own_style_and_script(tmp_path):
    page = page_of(make_run(tmp_path))
    (policy,) = [attrs["content"] for _, attrs in page.tags if attrs.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none';") and "unsafe" not in policy
    for kind in ("style", "script"):
        digest = base64.b64encode(hashlib.sha256(page.blocks[kind].encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy
    assert not any(name == "style" or name.startswith("on") for _, attrs in page.tags for name in attrs)


def test_links_within_the_page_lead_somewhere(tmp_path):
    page = page_of(make_run(tmp_path))
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    named = [attrs.get("href") or "" for _, attrs in page.tags if "download" not in attrs]
    wanted = {link[1:] for link in named if link.startswith("#")}
    wanted |= {
        attrs[name] for _, attrs in page.tags for name in ("aria-labelledby", "aria-describedby") if name in attrs
    }
    assert wanted <= set(ids)


def run_of_text(folder: Path, text: str) -> Path:
    """Make a run in which everything that others wrote is `text`."""
    score = {**FINAL["bits_per_byte"], "per_document": [{"name": text, "value": 1.625}], "interval_over": text}
    return make_run(
        folder,
        run={**RUN, "name": text, "data": corpus(text), "environment": {text: text}, "config": {text: text}},
        ledger=[
            *LEDGER[:4],
            {"event": "sample", "step": 3, "prompt": text, "text": text + " and on"},
            {"event": "skip", "step": 3, "reason": text},
        ],
        final={"bits_per_byte": score, "baselines": [{"name": text, "bits_per_byte": 2.5, "note": text}]},
    )


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_is_shown_and_never_becomes_markup(tmp_path, text):
    tame, hostile = page_of(run_of_text(tmp_path / "1", "tame")), page_of(run_of_text(tmp_path / "2", text))
    assert [(tag, set(attrs)) for tag, attrs in hostile.tags] == [(tag, set(attrs)) for tag, attrs in tame.tags]
    assert hostile.text.count(text) >= 10


def test_half_a_character_in_a_sample_does_not_stop_the_report(tmp_path):
    run = make_run(tmp_path, ledger=[*LEDGER[:2], {"event": "sample", "step": 1, "prompt": "", "text": "a\ud800b"}])
    assert "a?b" in write_report(run).read_text("utf-8")


@pytest.mark.parametrize("missing", [("run",), ("ledger",), ("final",), ("run", "ledger"), ("run", "ledger", "final")])
def test_a_missing_part_still_gives_a_page(tmp_path, missing):
    page = page_of(make_run(tmp_path, **dict.fromkeys(missing)))
    assert "OpenELM training report" in page.text
    assert ("Learning curve" in page.text) == ("ledger" not in missing)


@pytest.mark.parametrize("key", sorted(RUN))
def test_a_missing_key_of_the_run_file_still_gives_a_page(tmp_path, key):
    assert page_of(make_run(tmp_path, run={name: value for name, value in RUN.items() if name != key})).text


@pytest.mark.parametrize("key", ["tokens", "target_bytes", "gradient_norm", "learning_rate", "seconds", "mfu"])
def test_a_missing_measurement_still_gives_a_page(tmp_path, key):
    ledger = [{name: value for name, value in event.items() if name != key} for event in LEDGER]
    assert "HAMLET." in page_of(make_run(tmp_path, ledger=ledger)).text


def test_a_run_that_has_just_started_says_so(tmp_path):
    record = read_run(make_run(tmp_path, ledger=LEDGER[:1], final=None))
    assert verdict(record) == "The run has started; no step is recorded yet."
    assert "not finished, at step 0" in render(record)


def test_void_steps_are_not_drawn_but_the_rewind_is(tmp_path):
    page = page_of(make_run(tmp_path))
    drawn = [float(value) for series, _, value in page.csv("learning") if series.startswith("training")]
    void = VOID_LOSS / math.log(2) * 1000 / 4000
    assert drawn and not any(math.isclose(value, void) for value in drawn)
    assert "VOID." not in page.text and "6.125" not in page.text
    assert "step 5: went back to a checkpoint" in page.text
    assert "and 4\u202fs repeated" in page.text


def test_a_rewind_that_made_nothing_void_is_not_marked(tmp_path):
    ledger = [*LEDGER[:4], {"event": "rewind", "step": 3, "to": 3}, {"event": "resume", "step": 3}]
    assert [event.event for event in read_run(make_run(tmp_path, ledger=ledger)).events] == [
        "start",
        "rewind",
        "resume",
    ]
    assert "went back" not in page_of(tmp_path).text


def test_values_in_the_page_equal_those_of_the_ledger(tmp_path):
    page = page_of(make_run(tmp_path))
    rates = {int(number): float(value) for _, number, value in page.csv("rate")}
    assert rates == {number: 3e-3 / number for number in range(1, 7)}
    curve = {int(number): float(value) for series, number, value in page.csv("learning") if "each" in series}
    assert curve == {
        number: (2.0 if number == 6 else SOUND_LOSS) / math.log(2) * 1000 / 4000 for number in (1, 2, 3, 4, 6)
    }
    held_out = [(number, float(value)) for series, number, value in page.csv("learning") if "held-out" in series]
    assert held_out == [("6", 1.875)]


def test_a_loss_that_is_not_finite_is_counted_instead_of_drawn(tmp_path):
    page = page_of(make_run(tmp_path))
    assert "1 value that is not finite and above zero is not drawn." in page.text
    assert "nan" not in page.text.lower()


def test_key_figures_follow_from_the_run(tmp_path):
    text = page_of(make_run(tmp_path)).text
    for figure in ("2.09\u202fM", "6.14\u202fk", "1\u202fmin 15\u202fs", "512", "25\u202f%", "1.750"):
        assert figure in text


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [
        (1.5, 2.0, "30\u202f% fewer than the best baseline, byte 6-grams (2.500)"),
        (1.5, 2.6, "neither is shown to be better"),
        (None, None, "(no interval), 30\u202f% fewer than the best baseline"),
    ],
)
def test_the_verdict_claims_no_more_than_its_interval(tmp_path, low, high, said):
    score = {**FINAL["bits_per_byte"], "low": low, "high": high}
    assert said in verdict(read_run(make_run(tmp_path, final={**FINAL, "bits_per_byte": score})))


def test_the_verdict_admits_a_worse_result(tmp_path):
    final = {**FINAL, "baselines": [{"name": "better", "bits_per_byte": 1.25}]}
    assert "40\u202f% more than the best baseline, better (1.250)" in verdict(read_run(make_run(tmp_path, final=final)))


def test_only_a_commit_hash_gets_into_the_commands(tmp_path):
    assert commands(read_run(make_run(tmp_path)))[0] == "git checkout 0123456789abcdef"
    record = read_run(make_run(tmp_path, run={**RUN, "git_commit": "$(rm -r .)"}, ledger=None))
    assert not any("rm" in line for line in commands(record))


def test_a_line_that_is_still_being_written_is_left_out(tmp_path):
    run = make_run(tmp_path)
    with (run / "ledger.jsonl").open("ab") as file:
        file.write(b'{"event": "step", "st')
    assert read_run(run).last_step == 6


def test_a_long_run_gives_a_small_page(tmp_path):
    run = make_run(tmp_path, ledger=[step(number, 2 + 1 / number) for number in range(1, 3001)])
    assert len(render(read_run(run))) < 500_000
    assert len(page_of(run).csv("gradient")) <= 600


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("run.json", "{", "not valid JSON"),
        ("run.json", "[]", "the top level"),
        ("run.json", '{"plan": {"dim": 1, "head_dim": 1, "query_heads": [1], "kv_heads": [], "ffn_dims": []}}', "plan"),
        ("data.json", "{}", "openelm data manifest"),
        ("eval/final.json", '{"bits_per_byte": {"value": "many"}}', "bits_per_byte.value"),
        ("eval/final.json", '{"bits_per_byte": {"value": NaN}}', "bits_per_byte.value"),
        ("ledger.jsonl", '{"event": "step"}\n', "ledger"),
        ("ledger.jsonl", json.dumps({"event": "step", "step": 1, "loss": "x", "prev": "0" * 64}) + "\n", "loss"),
        ("ledger.jsonl", json.dumps({"event": "rewind", "step": 1, "prev": "0" * 64}) + "\n", "to"),
    ],
)
def test_a_broken_file_gives_an_error_that_names_it(tmp_path, name, content, said):
    run = make_run(tmp_path)
    (run / name).write_text(content)
    with pytest.raises(CheckpointError) as error:
        read_run(run)
    assert Path(error.value.file) == run / name
    assert said in str(error.value)


def test_a_missing_folder_is_an_error(tmp_path):
    with pytest.raises(CheckpointError, match="no run folder"):
        write_report(tmp_path / "nowhere")
