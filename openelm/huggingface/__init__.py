"""OpenELM for Hugging Face transformers: two files that need transformers alone, and their registration."""

from __future__ import annotations

from types import ModuleType


def register(auto: ModuleType) -> None:
    """Make the Auto classes in a module of transformers know `model_type: openelm`, without a model folder's code."""
    from openelm.huggingface.configuration_openelm import OpenELMConfig

    if hasattr(auto, "AutoModelForCausalLM"):
        from openelm.huggingface.modeling_openelm import OpenELMForCausalLM, OpenELMModel

        auto.AutoModel.register(OpenELMConfig, OpenELMModel, exist_ok=True)
        auto.AutoModelForCausalLM.register(OpenELMConfig, OpenELMForCausalLM, exist_ok=True)
    else:
        auto.AutoConfig.register(OpenELMConfig.model_type, OpenELMConfig, exist_ok=True)
