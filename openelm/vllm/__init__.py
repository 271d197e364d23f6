"""OpenELM for vLLM: a plugin of the group `vllm.general_plugins`, which vLLM loads in each of its processes."""

from __future__ import annotations

import importlib.util

ARCHITECTURE = "OpenELMForCausalLM"


def register() -> None:
    """Make vLLM know the model and how many heads each of its layers has; without vLLM, do nothing."""
    if importlib.util.find_spec("vllm") is None:
        return
    from vllm import ModelRegistry
    from vllm.transformers_utils.model_arch_config_convertor import MODEL_ARCH_CONFIG_CONVERTORS

    from openelm.vllm.heads import OpenELMHeads

    ModelRegistry.register_model(ARCHITECTURE, f"openelm.vllm.model:{ARCHITECTURE}")
    MODEL_ARCH_CONFIG_CONVERTORS["openelm"] = OpenELMHeads
