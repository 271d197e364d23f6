"""The fused operations of the model, one file each: plain torch in and out, exact gradients, any device."""
