"""Adapters: few weights that learn beside frozen ones (LoRA, DoRA), through the library peft."""
