"""Our scorer beside the harness's own class for models of transformers, and its own questions answered in any order."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from openelm.errors import ConfigError
from openelm.evaluate.answers import Answers
from openelm.evaluate.trees import Forest, OurScores
from openelm.kernels import native
from openelm.model.packed import pack_model
from openelm.model.transformer import OpenELM
from openelm.text.tokenizer import Tokenizer

pytest.importorskip("lm_eval")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")

PAIRS = (
    ("the cat", " sat"),
    ("the cat", " sat on the mat"),
    ("the cat ", "sat on"),  # the space belongs to the answer
    ("", "nothing stands before this"),
    ("x", "y"),
    ("a prompt far beyond the context " * 6, " is cut at its beginning"),
    ("the cat", " sat"),  # asked twice
)


class Counting:
    """A model that counts the tokens that pass it."""

    def __init__(self, scores: OurScores) -> None:
        self._scores, self.tokens = scores, 0
        self.context_tokens, self.vocab_size = scores.context_tokens, scores.vocab_size

    def states(self, forest: Forest) -> torch.Tensor:
        self.tokens += len(forest.tokens)
        return self._scores.states(forest)

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        return self._scores.logits(states)


def asked(pairs: Sequence[tuple[str, ...]]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance("loglikelihood", {}, pair, number) for number, pair in enumerate(pairs)]


@pytest.fixture
def answers() -> Iterator[Answers]:
    with Answers(None, "model") as made:
        yield made


def test_answers_are_those_of_the_harnesss_own_class(tmp_path: Path, answers: Answers) -> None:
    """Prompts longer than the context, empty ones and whole texts in windows, too."""
    from lm_eval.models.huggingface import HFLM
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from openelm.evaluate.examinees import TransformersTokenizer
    from openelm.evaluate.foreign import TransformersScores
    from openelm.evaluate.harness import Examinee

    letters = {chr(code): code - 31 for code in range(32, 127)}
    made = Tokenizer(models.WordLevel({"<s>": 0, **letters, "?": 99} | letters, unk_token="?"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="<s>")
    torch.manual_seed(2)
    config = LlamaConfig(
        vocab_size=101,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        bos_token_id=0,
        eos_token_id=0,
    )
    llama = LlamaForCausalLM(config).eval()
    theirs = HFLM(pretrained=llama, tokenizer=tokenizer, batch_size=2, device="cpu")
    ours = Examinee(TransformersScores(llama), TransformersTokenizer(tokenizer), answers)
    wanted, found = (lm.loglikelihood(asked(PAIRS), disable_tqdm=True) for lm in (theirs, ours))
    for (nats, greedy), (their_nats, their_greedy) in zip(found, wanted, strict=True):
        assert nats == pytest.approx(their_nats, abs=2e-4) and greedy == their_greedy
    texts = [("short",), ("a text that needs several windows of the context. " * 5,)]
    wanted, found = (lm.loglikelihood_rolling(asked(texts), disable_tqdm=True) for lm in (theirs, ours))
    assert found == pytest.approx(wanted, abs=2e-3)


@pytest.mark.skipif(native.kernels_name() == "torch", reason="torch's products depend on the company")
def test_batches_change_no_bit(model: OpenELM, tokenizer: Tokenizer) -> None:
    from openelm.evaluate.examinees import OurTokenizer
    from openelm.evaluate.harness import Examinee

    packed = pack_model(model)
    assert packed is not None
    results = []
    for tokens in (None, 1, 40, 100_000):
        with Answers(None, "model") as answers:
            scores, encodes = OurScores(packed, tokenizer.vocab_size), OurTokenizer(tokenizer)
            examinee = Examinee(scores, encodes, answers, most_tokens=tokens)
            results.append(examinee.loglikelihood(asked(PAIRS), disable_tqdm=True))
    assert all(result == results[0] for result in results[1:])


def test_a_prompt_passes_once_and_what_is_known_not_at_all(
    model: OpenELM, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    from openelm.evaluate.examinees import OurTokenizer
    from openelm.evaluate.harness import Examinee

    scores = Counting(OurScores(model, tokenizer.vocab_size))
    pairs = [("12345678", answer) for answer in ("ab", "cd", "x", "ab")]
    with Answers(tmp_path / "answers.jsonl", "model") as answers:
        first = Examinee(scores, OurTokenizer(tokenizer), answers).loglikelihood(asked(pairs), disable_tqdm=True)
    assert scores.tokens == 9 + 1 + 1  # BOS and the prompt, and one token of each answer that has two
    with Answers(tmp_path / "answers.jsonl", "model") as answers:
        examinee = Examinee(scores, OurTokenizer(tokenizer), answers)
        assert examinee.loglikelihood(asked(pairs), disable_tqdm=True) == first
        assert scores.tokens == 11
        examinee.loglikelihood(asked([*pairs, ("12345678", "y")]), disable_tqdm=True)
    assert scores.tokens == 11 + 9


def test_memory_that_runs_out_halves_what_passes_together(
    model: OpenELM, tokenizer: Tokenizer, answers: Answers
) -> None:
    from openelm.evaluate.examinees import OurTokenizer
    from openelm.evaluate.harness import Examinee

    class Small(Counting):
        def states(self, forest: Forest) -> torch.Tensor:
            if len(forest.tokens) > 40:
                raise torch.OutOfMemoryError("no")
            return super().states(forest)

    pairs = [(f"prompt {number}", " and its answer") for number in range(8)]
    plain = Examinee(OurScores(model, 257), OurTokenizer(tokenizer), answers, most_tokens=1)
    wanted = plain.loglikelihood(asked(pairs), disable_tqdm=True)
    with Answers(None, "model") as others:
        small = Examinee(Small(OurScores(model, 257)), OurTokenizer(tokenizer), others, most_tokens=300)
        found = small.loglikelihood(asked(pairs), disable_tqdm=True)
    assert [nats for nats, _ in found] == pytest.approx([nats for nats, _ in wanted], abs=1e-4)


def test_texts_are_continued_until_an_end(model: OpenELM, tokenizer: Tokenizer, answers: Answers) -> None:
    from openelm.evaluate.examinees import EngineWrites, OurTokenizer
    from openelm.evaluate.harness import Examinee
    from openelm.generate.engine import generate_text
    from openelm.generate.sampling import SamplingConfig

    scores = OurScores(model, tokenizer.vocab_size)
    examinee = Examinee(scores, OurTokenizer(tokenizer), answers, writes=EngineWrites(model, tokenizer))
    prompts = [f"prompt {number}" for number in range(11)]
    plain = [
        generate_text(model, tokenizer, prompt, SamplingConfig(temperature=0, max_tokens=12)) for prompt in prompts
    ]
    options: dict[str, Any] = {"max_gen_toks": 12, "until": []}
    assert examinee.generate_until(asked([(prompt, options) for prompt in prompts])) == plain
    end = next(text for text in plain if len(text) > 2)[1]
    cut = [text.split(end)[0] for text in plain]
    found = examinee.generate_until(asked([(prompt, options | {"until": [end]}) for prompt in prompts]))
    assert found == cut
    silent = Examinee(scores, OurTokenizer(tokenizer), answers)
    with pytest.raises(ConfigError, match="write"):
        silent.generate_until(asked([("a", options)]))
    with pytest.raises(ConfigError, match="samples"):
        examinee.generate_until(asked([("a", {"do_sample": True})]))


def test_texts_that_were_written_before_a_stop_are_not_written_again(
    model: OpenELM, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    from openelm.evaluate.examinees import OurTokenizer
    from openelm.evaluate.harness import Examinee, Writing

    written = list[Writing]()
    stops_after = 3

    def writes(writings: Sequence[Writing]) -> Iterator[str]:
        for writing in writings:
            if len(written) == stops_after:
                raise KeyboardInterrupt
            written.append(writing)
            yield f"after {len(writing.ids)} up to {writing.until} or {writing.most_tokens}"

    prompts = [(f"prompt {'x' * number}", {"max_gen_toks": 12, "until": ["."]}) for number in range(6)]

    def texts(requests: list[Any], model_sha256: str = "model") -> list[str]:
        with Answers(tmp_path / "answers.jsonl", model_sha256) as answers:
            examinee = Examinee(OurScores(model, 257), OurTokenizer(tokenizer), answers, writes=writes)
            return examinee.generate_until(asked(requests))

    with pytest.raises(KeyboardInterrupt):
        texts(prompts)
    stops_after = 1000
    expected = [f"after {8 + number} up to ('.',) or 12" for number in range(6)]
    assert texts([*prompts, prompts[0]]) == [*expected, expected[0]]
    assert len(written) == 6  # three before the stop, three after it, and none for what was asked twice
    assert texts(list(reversed(prompts))) == list(reversed(expected)) and len(written) == 6
    texts([(prompt, options | {"until": ["!"]}) for prompt, options in prompts])
    texts([(prompt, options | {"max_gen_toks": 13}) for prompt, options in prompts])
    texts(prompts, "another model, device or dtype")
    assert len(written) == 4 * 6


def test_questions_of_a_file_are_counted_by_hand(model: OpenELM, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Accuracy, that by length, the interval's place and bits per byte, from the log-likelihoods themselves."""
    from math import log

    from openelm.evaluate.examinees import Candidate, OurTokenizer
    from openelm.evaluate.run import load_suite, result_file, run_suite

    rows = [
        {"query": f"{first} plus {second} is", "choices": [str(first + second), "no", "perhaps"], "gold": 0}
        for first in range(4)
        for second in range(5)
    ]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    candidate = Candidate("m", "0" * 64, "", OurScores(model, tokenizer.vocab_size), OurTokenizer(tokenizer), None)
    suite = f"choices:{tmp_path / 'sums.jsonl'}"
    exam = run_suite(candidate, suite, load_suite(suite, "local"), tmp_path / "out")
    (task,) = exam.tasks
    right, bits, count = 0, 0.0, 0
    for item, row in zip(task.items, rows, strict=True):
        texts = [f" {choice}" for choice in row["choices"]]
        with torch.no_grad():
            nats = []
            for text in texts:
                prompt = [256, *tokenizer.encode(str(row["query"]))]
                answer = tokenizer.encode(text)
                logits = model(torch.tensor([[*prompt, *answer]]))[0, :, :258].log_softmax(-1)
                nats.append(sum(float(logits[len(prompt) - 1 + place, token]) for place, token in enumerate(answer)))
        assert item.nats == pytest.approx(nats, abs=1e-3)
        by_length = [value / len(choice) for value, choice in zip(item.nats, row["choices"], strict=True)]
        right += by_length.index(max(by_length)) == 0
        bits, count = bits - item.nats[0] / log(2), count + len(texts[0])
    assert task.metric == "acc_norm" and task.n == 20 and task.value == right / 20 == exam.average
    low, high = task.interval or (1.0, 0.0)
    assert low <= task.value <= high
    assert task.bits_per_byte == pytest.approx(bits / count)
    saved = json.loads((tmp_path / "out" / result_file(suite, None)).read_bytes())
    assert saved == json.loads(json.dumps(exam.to_json()))


@pytest.fixture
def two_tasks() -> Any:
    from openelm.evaluate.tasks import multiple_choice

    rows = [{"query": f"{number} is", "choices": ["even", "odd"], "gold": number % 2} for number in range(6)]
    return [multiple_choice("first", rows), multiple_choice("second", rows[:3])]


def test_a_part_of_the_questions_does_not_replace_all_of_them(
    model: OpenELM, tokenizer: Tokenizer, two_tasks: Any, tmp_path: Path
) -> None:
    from openelm.evaluate.examinees import Candidate, OurTokenizer
    from openelm.evaluate.run import ExamOptions, run_suite

    scores = Counting(OurScores(model, 257))
    candidate = Candidate("m", "0" * 64, "cpu", scores, OurTokenizer(tokenizer), None)
    whole = run_suite(candidate, "mine", two_tasks, tmp_path)
    passed = scores.tokens
    part = run_suite(candidate, "mine", two_tasks, tmp_path, ExamOptions(limit=2))
    assert [task.n for task in whole.tasks] == [6, 3] and [task.n for task in part.tasks] == [2, 2]
    assert json.loads((tmp_path / "mine.json").read_bytes())["tasks"][0]["n"] == 6
    assert json.loads((tmp_path / "mine-first-2.json").read_bytes())["tasks"][0]["n"] == 2
    assert scores.tokens == passed  # all of it was known
    other = Candidate("m", "0" * 64, "another device", scores, OurTokenizer(tokenizer), None)
    run_suite(other, "mine", two_tasks, tmp_path)
    assert scores.tokens == 2 * passed


def test_models_that_differ_in_any_file_are_others(tmp_path: Path) -> None:
    from openelm.evaluate.examinees import _sha256

    hashes = set()
    for number, name in enumerate(("config.json", "pytorch_model.bin", "model.safetensors", "vocab.txt", "README.md")):
        (tmp_path / name).write_bytes(b"%d" % number)
        hashes.add(_sha256(tmp_path, lambda what, done, total: None))
    assert len(hashes) == 4  # a page about the model decides nothing


def test_hashing_is_shown_where_a_file_is_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from openelm.evaluate import examinees

    (tmp_path / "config.json").write_bytes(b"{}")
    (tmp_path / "model.safetensors").write_bytes(bytes(3 << 20))
    seen = list[tuple[str, int, int]]()
    plain = examinees._sha256(tmp_path, lambda *told: seen.append(told))
    assert seen == []
    monkeypatch.setattr(examinees, "_LARGE_BYTES", 2 << 20)
    assert examinees._sha256(tmp_path, lambda *told: seen.append(told)) == plain
    total = 2 + (3 << 20)
    assert [done for _, done, _ in seen] == [2, *(2 + (count << 20) for count in (1, 2, 3))]
    assert {told[::2] for told in seen} == {("bytes hashed", total)}


def test_two_models_see_the_same_examples(model: OpenELM, tokenizer: Tokenizer) -> None:
    from openelm.evaluate import tasks
    from openelm.evaluate.exam import examine
    from openelm.evaluate.examinees import OurTokenizer
    from openelm.evaluate.harness import Examinee

    rows = [{"query": f"{number} is", "choices": ["even", "odd"], "gold": number % 2} for number in range(40)]
    config = tasks.multiple_choice("numbers", rows).parts["numbers"].config.to_dict(keep_callable=True)
    config |= {"num_fewshot": 3, "fewshot_split": "test"}
    task = tasks.LoadedTask(
        tasks.TaskSpec("numbers", 3, "acc", ""), {"numbers": tasks.ConfigurableTask(config=config)}, None
    )
    asked_twice = []
    for _ in range(2):
        with Answers(None, "model") as answers:
            examinee = Examinee(OurScores(model, 257), OurTokenizer(tokenizer), answers)
            (score,) = examine(examinee, [task], limit=4)
        asked_twice.append([item.sha256 for item in score.items])
    assert asked_twice[0] == asked_twice[1] and len(set(asked_twice[0])) == 4


def test_a_task_is_asked_once_and_by_a_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    from openelm.evaluate import tasks
    from openelm.evaluate.run import load_suite

    made: dict[str, Any] = {"task": "made", "output_type": "loglikelihood"}
    made |= {"doc_to_text": "{{a}}", "doc_to_target": "{{b}}", "test_split": "test"}
    made |= {"custom_dataset": lambda **options: {"test": tasks.Dataset.from_list([{"a": "1", "b": "2"}])}}
    task = tasks.ConfigurableTask(config={**made, "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}]})
    assert tasks._first_mean("made", task) == "acc"
    with pytest.raises(ConfigError, match="none is a mean"):
        tasks._first_mean("made", tasks.ConfigurableTask(config={**made, "metric_list": [{"metric": "perplexity"}]}))
    monkeypatch.setattr(tasks, "_built", lambda manager, configs: {config["task"]: task for config in configs})
    monkeypatch.setattr(tasks, "_reaches", lambda hub: True)
    with pytest.raises(ConfigError, match="asked twice"):
        load_suite("lm-eval:arc_easy,arc_easy@5", "auto")
    with pytest.raises(ConfigError, match=r"has no task 'arc_hardest'; near: .*arc_"):
        tasks._members(tasks._manager(["arc_easy"]), "arc_hardest")
