"""How good a model is: scores with intervals, simple baselines beside them, tables."""
