"""What people read beside a converted model: a model card, and Ollama's description of a GGUF file."""

from __future__ import annotations

from openelm.convert.source import Source

_ROLES = ("system", "user", "assistant")


def card(source: Source) -> str:
    """Write the README of a converted model, with the fields that the Hugging Face hub reads."""
    config, plan = source.config, source.config.plan
    heads, widths = (f"{min(row)} to {max(row)}" for row in (plan.query_heads, plan.ffn_dims))
    kind = "tuned to chat" if source.chat_tuned else "a base model: it continues text"
    notes = "".join(f"- {note}\n" for note in source.notes)
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags:
- openelm
---

# {source.path.stem}

An OpenELM (arXiv 2404.14619) of {config.parameters:,} parameters, {kind}.

| | |
|---|---|
| layers, width, head size | {plan.layers}, {plan.dim}, {plan.head_dim} |
| query heads and feed-forward width of a layer | {heads}; {widths} |
| context, vocabulary | {config.max_context_length:,}; {config.vocab_size:,} |
| converted from | `{source.layout}` |

{notes}
```python
import openelm  # registers the model with transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

model, tokenizer = AutoModelForCausalLM.from_pretrained("."), AutoTokenizer.from_pretrained(".")
```
"""


def modelfile(source: Source, weights: str) -> str:
    """Describe a GGUF file for `ollama create`."""
    lines = [f"FROM ./{weights}", f"PARAMETER num_ctx {source.config.max_context_length}"]
    if source.chat_tuned:
        turns = "".join(
            f'{{{{ if eq .Role "{role}" }}}}<|{role}|>\n{{{{ .Content }}}}</s>\n{{{{ end }}}}' for role in _ROLES
        )
        lines += [
            f'TEMPLATE """{{{{- range .Messages }}}}{turns}{{{{- end }}}}<|assistant|>\n"""',
            'PARAMETER stop "</s>"',
        ]
    else:
        lines.append('TEMPLATE """{{ .Prompt }}"""')
    return "\n".join(lines) + "\n"
