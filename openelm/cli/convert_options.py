"""The options of `convert`, `quantize` and `push`; imports nothing that reads models, so help is instant."""

from __future__ import annotations

import argparse

from openelm.convert.targets import TARGETS

CONVERT_EXAMPLE = (
    "openelm convert checkpoint_average.pt --to hf --tokenizer tokenizer.model --rows 32000 -o openelm-270m\n\n"
    "sources: folders of Hugging Face (Apple's release, ours) and MLX (Apple's, mlx-lm's, quantised too),\n"
    "  of Llamas (SmolLM2 and others), .pt files of CoreNet (read without running them; adapters are merged),\n"
    "  .gguf files\n\n"
    "targets, each a new folder:\n"
    "  hf       config.json and safetensors: transformers, vLLM, and all that this program does\n"
    "  mlx      the same folder, as mlx-lm reads it\n"
    "  gguf     model.gguf for llama.cpp and its relatives, and a Modelfile for Ollama\n"
    "  onnx     model.onnx with a key/value cache, for onnxruntime and OpenVINO\n"
    "  corenet  checkpoint.pt, as Apple's training code reads it"
)

QUANTIZE_EXAMPLE = (
    "openelm quantize runs/demo/model -o model-4bit --bits 4 --calibration texts/ --evaluate held-out/\n\n"
    "The copy is a model folder: generate, chat, eval and inspect take it, and mlx-lm does too.\n\n"
    "methods:\n"
    "  rtn   round each number to the nearest; 8 bits lose next to nothing so\n"
    "  gptq  round for the products with a calibration text: of the layers, one after the other; best for 4 bits\n\n"
    "The text of --calibration should be like what the model will read; 16,384 tokens of it are used."
)


def add_convert_options(parser: argparse.ArgumentParser) -> None:
    """Describe the options."""
    parser.add_argument("source", help="model folder, .pt or .gguf file")
    parser.add_argument("--to", required=True, choices=tuple(TARGETS), help="see below")
    parser.add_argument("-o", "--out", required=True, help="folder to make")
    parser.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), help="round all numbers (default: keep them)")
    parser.add_argument(
        "--quantize", metavar="KIND", help="pack matrices: f32, f16, bf16, q8_0 and more for gguf; 4 or 8 bits for mlx"
    )
    parser.add_argument("--tokenizer", metavar="FILE", help="a .model or tokenizer.json to attach")
    parser.add_argument("--rows", type=int, metavar="N", help="rows of the vocabulary: cut off, or zeros put behind")
    parser.add_argument(
        "--kind",
        choices=("base", "instruct"),
        help="whether it learned the chat format, so that a chat template comes with it (default: as the source)",
    )
    parser.add_argument(
        "--self-contained", action="store_true", help="add Python files, so that transformers alone loads the hf folder"
    )
    parser.add_argument(
        "--shard-gb", type=float, default=5.0, metavar="N", help="most GB of a file of weights (default: %(default)s)"
    )
    parser.add_argument("--replace", action="store_true", help="replace a folder that was made so before")


def add_quantize_options(parser: argparse.ArgumentParser) -> None:
    """Describe the options."""
    parser.add_argument("model", help="model folder, not quantised")
    parser.add_argument("-o", "--out", required=True, help="folder to make; it must not exist")
    parser.add_argument("--bits", type=int, required=True, choices=(4, 8), help="of a number of a matrix")
    parser.add_argument(
        "--group",
        type=int,
        choices=(32, 64),
        help="numbers that share a scale and a bias (default: 64, or 32 where rows are whole groups of that alone)",
    )
    parser.add_argument(
        "--method", choices=("rtn", "gptq"), help="see below (default: gptq with --calibration, else rtn)"
    )
    parser.add_argument("--calibration", metavar="TEXT", help="file, folder or glob of .txt, .jsonl, .parquet")
    parser.add_argument(
        "--evaluate", metavar="TEXT", help="print the bits per byte of these documents before and after, in fp32"
    )


def add_push_options(parser: argparse.ArgumentParser) -> None:
    """Describe the options."""
    parser.add_argument("model", help="model folder, checked before anything is sent")
    parser.add_argument("repo", metavar="OWNER/NAME", help="repository on the hub, made if there is none")
    parser.add_argument("--private", action="store_true", help="only you can see it")
    parser.add_argument("--revision", metavar="BRANCH", help="made if there is none (default: main)")
    parser.add_argument("--message", metavar="TEXT", help="of the commit (default: the number of parameters)")
    parser.add_argument("--card", metavar="FILE", help="a README.md to upload instead of the folder's")
