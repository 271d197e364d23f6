"""Ask vLLM what a model folder predicts; runtimes.py and the tests run this with the interpreter that has vLLM.

Reads a JSON object from the file named first: `options` of vllm.LLM, and `asked`, a list of requests with `prompts`
(lists of ids) and `options` of vllm.SamplingParams. Writes one to the file named second: `blocks` of the cache and
`block_tokens` of each; `answers`, for each request and prompt: `ids` that were generated, how many tokens of the prompt
were `cached`, and log-probabilities as pairs (id, value), `steps` of each generated id and `prompt` of each id of the
prompt but the first.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def pairs(entry: dict[int, Any]) -> list[tuple[int, float]]:
    return [(number, value.logprob) for number, value in entry.items()]


def answer(row: Any) -> dict[str, Any]:
    return {
        "ids": list(row.outputs[0].token_ids),
        "cached": row.num_cached_tokens,
        "steps": [pairs(step) for step in row.outputs[0].logprobs or []],
        "prompt": [pairs(step) for step in (row.prompt_logprobs or [])[1:]],
    }


def main() -> None:
    from vllm import LLM, SamplingParams

    question = json.loads(Path(sys.argv[1]).read_text())
    model, answers = LLM(**question["options"]), []
    for asked in question["asked"]:
        prompts = [{"prompt_token_ids": ids} for ids in asked["prompts"]]
        rows = model.generate(prompts, SamplingParams(**asked["options"]), use_tqdm=False)
        answers.append([answer(row) for row in rows])
    cache = model.llm_engine.vllm_config.cache_config
    found = {"blocks": cache.num_gpu_blocks, "block_tokens": cache.block_size, "answers": answers}
    Path(sys.argv[2]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
