"""Ask vLLM what a model folder predicts; tests/convert/test_vllm.py runs this where vLLM is installed.

Reads a JSON object from the file named first: `options` of vllm.LLM, and `asked`, a list of requests with `prompts`
(lists of ids) and `options` of vllm.SamplingParams. Writes to the file named second, for each request and prompt, `ids`
that were generated, and log-probabilities as pairs (id, value): `steps` of each of them, `prompt` of each but the first
id of the prompt.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def pairs(entry: dict[int, Any]) -> list[tuple[int, float]]:
    return [(number, value.logprob) for number, value in entry.items()]


def main() -> None:
    from vllm import LLM, SamplingParams

    question = json.loads(Path(sys.argv[1]).read_text())
    model = LLM(**question["options"])
    answers = []
    for asked in question["asked"]:
        prompts = [{"prompt_token_ids": ids} for ids in asked["prompts"]]
        found = model.generate(prompts, SamplingParams(**asked["options"]), use_tqdm=False)
        answers.append(
            [
                {
                    "ids": list(row.outputs[0].token_ids),
                    "steps": [pairs(step) for step in row.outputs[0].logprobs or []],
                    "prompt": [pairs(step) for step in (row.prompt_logprobs or [])[1:]],
                }
                for row in found
            ]
        )
    Path(sys.argv[2]).write_text(json.dumps(answers))


if __name__ == "__main__":
    main()
