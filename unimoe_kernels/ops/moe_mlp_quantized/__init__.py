"""The operator `moe_mlp_quantized`."""
