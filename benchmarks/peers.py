"""Training steps of other packages on the work of `benchmarks.work`, as their own users would write or start them.

Each maker imports its package only when called. All load the same weights and step on the same batch; optimizers have
the same hyperparameters. `peers.txt` pins what was measured.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from queue import Queue
from typing import Any

from benchmarks.work import (
    BETAS,
    CLIP_NORM,
    EPS,
    LEARNING_RATE,
    WEIGHT_DECAY,
    CannotCompare,
    Maker,
    Side,
    Step,
    Work,
    tensors,
)


def adamw(model: Any) -> Any:
    """Make the optimizer of a plain loop: fused, which is the fastest that torch has; norms are not decayed."""
    import torch

    decayed = [p for p in model.parameters() if p.ndim >= 2]
    rest = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=BETAS, eps=EPS, fused=True)


def plain_loop(model: Any, loss_of: Callable[[], Any], precision: str) -> Step:
    """Make the step that everybody writes: autocast, backward, clip, AdamW."""
    import torch

    optimizer = adamw(model)

    def step() -> dict[str, float]:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = loss_of()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
        optimizer.step()
        optimizer.zero_grad()
        return {"loss": float(loss.detach())}

    return step


def side(step: Step, model: Any, optimizer: str, *packages: str) -> Side:
    parameters = sum(p.numel() for p in model.parameters())
    return Side(step, parameters, {"packages": {name: version(name) for name in packages}, "optimizer": optimizer})


def llama(folder: Path, work: Work) -> tuple[Any, Any, Any]:
    """Return the inputs, the targets and Hugging Face's LLaMA with the uniform model's weights."""
    from transformers import LlamaForCausalLM

    inputs, targets, weights = tensors(folder)
    config = llama_config(work, work.vocab_size, work.length)
    model = LlamaForCausalLM(config)
    model.load_state_dict(llama_names(weights, work))
    model.tie_weights()
    return inputs, targets, model.train()


def llama_config(widths: Any, vocab_size: int, length: int) -> Any:
    """Make Hugging Face's config of a LLaMA with equal layers; `widths` is a `Work` or a `LayerPlan`."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=widths.dim,
        intermediate_size=widths.ffn_dims[0],
        num_hidden_layers=len(widths.ffn_dims),
        num_attention_heads=widths.query_heads[0],
        num_key_value_heads=widths.kv_heads[0],
        head_dim=widths.head_dim,
        max_position_embeddings=length,
        tie_word_embeddings=True,
        use_cache=False,
    )


def llama_names(weights: dict[str, Any], work: Work) -> dict[str, Any]:
    """Rename published names and split fused projections; LLaMA has no norms of queries and keys."""
    heads = [count * work.head_dim for count in (work.query_heads[0], work.kv_heads[0], work.kv_heads[0])]
    embedding = weights["transformer.token_embeddings.weight"]
    named = {"model.embed_tokens.weight": embedding, "lm_head.weight": embedding}
    named["model.norm.weight"] = weights["transformer.norm.weight"]
    for layer in range(len(work.ffn_dims)):
        ours, theirs = f"transformer.layers.{layer}", f"model.layers.{layer}"
        qkv = weights[f"{ours}.attn.qkv_proj.weight"].split(heads)
        gate_up = weights[f"{ours}.ffn.proj_1.weight"].chunk(2)
        parts = {
            "input_layernorm": weights[f"{ours}.attn_norm.weight"],
            "post_attention_layernorm": weights[f"{ours}.ffn_norm.weight"],
            **dict(zip(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), qkv, strict=True)),
            "self_attn.o_proj": weights[f"{ours}.attn.out_proj.weight"],
            **dict(zip(("mlp.gate_proj", "mlp.up_proj"), gate_up, strict=True)),
            "mlp.down_proj": weights[f"{ours}.ffn.proj_2.weight"],
        }
        named |= {f"{theirs}.{name}.weight": weight for name, weight in parts.items()}
    return named


def transformers_side(folder: Path, work: Work, precision: str, *, compiled: bool = False) -> Side:
    """LlamaForCausalLM with its own loss in a plain loop."""
    inputs, targets, model = llama(folder, work)
    if compiled:
        model.compile()
    # With `shift_labels` its loss takes the targets as they are, so all positions count, as on the other sides.
    step = plain_loop(model, lambda: model(input_ids=inputs, labels=targets, shift_labels=targets).loss, precision)
    return side(step, model, "AdamW, fused", "transformers")


def trainer_side(folder: Path, work: Work, precision: str) -> Side:
    """The same model in Hugging Face's Trainer, whose loop waits in a callback for each turn."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    inputs, targets, model = llama(folder, work)
    go: Queue[None] = Queue()
    done: Queue[float | BaseException] = Queue()

    class Rows:
        def __len__(self) -> int:
            return 1_000_000 * work.rows

        def __getitem__(self, row: int) -> dict[str, Any]:
            targets_of_row = targets[row % work.rows]
            return {
                "input_ids": inputs[row % work.rows],
                "labels": targets_of_row,
                "shift_labels": targets_of_row,
            }

    class Recorded(Trainer):
        loss = float("nan")

        def training_step(self, *given: Any, **named: Any) -> Any:
            loss = super().training_step(*given, **named)
            self.loss = float(loss)
            return loss

    class Turns(TrainerCallback):
        def on_step_end(self, *given: Any, **named: Any) -> None:
            done.put(trainer.loss)
            go.get()

    arguments = TrainingArguments(
        output_dir=str(folder / "trainer"),
        per_device_train_batch_size=work.rows,
        max_steps=1_000_000,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        adam_beta1=BETAS[0],
        adam_beta2=BETAS[1],
        adam_epsilon=EPS,
        weight_decay=WEIGHT_DECAY,
        max_grad_norm=CLIP_NORM,
        bf16=precision == "bf16",
        use_cpu=True,
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        logging_strategy="no",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    trainer = Recorded(model=model, args=arguments, train_dataset=Rows(), callbacks=[Turns()])

    def run() -> None:
        go.get()
        try:
            trainer.train()
        except BaseException as error:
            done.put(error)

    threading.Thread(target=run, daemon=True).start()

    def step() -> dict[str, float]:
        go.put(None)
        result = done.get()
        if isinstance(result, BaseException):
            raise result
        return {"loss": result}

    return side(step, model, f"AdamW, {arguments.optim.value}", "transformers", "accelerate")


def litgpt_side(folder: Path, work: Work, precision: str, *, compiled: bool = False) -> Side:
    """LitGPT's model, loss and optimizer as its pre-training script puts them together; that script compiles."""
    import lightning
    import torch
    from litgpt.config import Config
    from litgpt.model import GPT
    from litgpt.utils import chunked_cross_entropy, instantiate_torch_optimizer

    inputs, targets, weights = tensors(folder)
    config = Config(
        name="equal",
        block_size=work.length,
        n_layer=len(work.ffn_dims),
        n_embd=work.dim,
        n_head=work.query_heads[0],
        head_size=work.head_dim,
        n_query_groups=work.kv_heads[0],
        vocab_size=work.vocab_size,
        padded_vocab_size=work.vocab_size,
        intermediate_size=work.ffn_dims[0],
        rotary_percentage=1.0,
        parallel_residual=False,
        bias=False,
        norm_class_name="RMSNorm",
        norm_eps=1e-6,
        mlp_class_name="LLaMAMLP",
    )
    bare = GPT(config)
    bare.load_state_dict(litgpt_names(weights, work))
    bare.transformer.wte.weight = bare.lm_head.weight  # its train.tie_embeddings
    fabric = lightning.Fabric(
        devices=1, accelerator="cpu", precision="bf16-mixed" if precision == "bf16" else "32-true"
    )
    model = fabric.setup(torch.compile(bare) if compiled else bare)
    settings = {"lr": LEARNING_RATE, "betas": BETAS, "eps": EPS, "weight_decay": WEIGHT_DECAY}
    choice = {"class_path": "torch.optim.AdamW", "init_args": settings}
    optimizer = fabric.setup_optimizers(instantiate_torch_optimizer(choice, model.parameters(), fused=False))

    def step() -> dict[str, float]:
        loss = chunked_cross_entropy(model(inputs), targets)
        fabric.backward(loss)
        fabric.clip_gradients(model, optimizer, max_norm=CLIP_NORM)
        optimizer.step()
        optimizer.zero_grad()
        return {"loss": float(loss.detach())}

    return side(step, bare, "AdamW", "litgpt", "lightning")


def litgpt_names(weights: dict[str, Any], work: Work) -> dict[str, Any]:
    """Rename published names and split the gate from the up projection."""
    embedding = weights["transformer.token_embeddings.weight"]
    named = {"lm_head.weight": embedding, "transformer.wte.weight": embedding}
    named["transformer.ln_f.weight"] = weights["transformer.norm.weight"]
    for layer in range(len(work.ffn_dims)):
        ours = f"transformer.layers.{layer}"
        gate, up = weights[f"{ours}.ffn.proj_1.weight"].chunk(2)
        parts = {
            "norm_1": weights[f"{ours}.attn_norm.weight"],
            "attn.qkv": weights[f"{ours}.attn.qkv_proj.weight"],
            "attn.proj": weights[f"{ours}.attn.out_proj.weight"],
            "norm_2": weights[f"{ours}.ffn_norm.weight"],
            "mlp.fc_1": gate,
            "mlp.fc_2": up,
            "mlp.proj": weights[f"{ours}.ffn.proj_2.weight"],
        }
        named |= {f"transformer.h.{layer}.{name}.weight": weight for name, weight in parts.items()}
    return named


def openelm_pytorch_side(folder: Path, work: Work, precision: str) -> Side:
    """The PyPI package's OpenELM on our own widths, with cross-entropy on its logits in a plain loop."""
    from openelm_pytorch.config import ModelConfig
    from openelm_pytorch.openelm import OpenELM
    from torch.nn.functional import cross_entropy

    inputs, targets, weights = tensors(folder)
    config = ModelConfig(
        vocab_size=work.vocab_size,
        num_transformer_layers=len(work.ffn_dims),
        model_dim=work.dim,
        head_dim=work.head_dim,
        ffn_dim_divisor=work.ffn_dim_divisor,
        num_gqa_groups=work.gqa_groups,
    )
    model = OpenELM.from_config(config)
    try:
        model.load_state_dict({name.removeprefix("transformer."): weight for name, weight in weights.items()})
    except RuntimeError as error:
        raise CannotCompare(f"its rule gives other widths: {error}") from None

    # It rotates queries and keys only where a cache is wanted, and then refuses batches of more than one row.
    rotates = work.rows == 1

    def loss() -> Any:
        logits = model(inputs, use_kv_cache=True)["logits"] if rotates else model(inputs)
        return cross_entropy(logits.flatten(0, 1), targets.flatten())

    made = side(plain_loop(model, loss, precision), model, "AdamW, fused", "openelm-pytorch")
    return made if rotates else replace(made, facts=made.facts | {"differs": "no rotary positions"})


PEERS: dict[str, Maker] = {
    "transformers": transformers_side,
    "transformers-compiled": lambda *work: transformers_side(*work, compiled=True),
    "trainer": trainer_side,
    "litgpt": litgpt_side,
    "litgpt-compiled": lambda *work: litgpt_side(*work, compiled=True),
    "openelm-pytorch": openelm_pytorch_side,
}
UNIFORM = tuple(name for name in PEERS if name != "openelm-pytorch")
"""These can only make models whose layers are alike."""
