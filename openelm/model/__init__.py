"""The model: the per-layer plan, its exact costs, the forward pass, the cache and the model folder."""
