"""The operator `moe_mlp`."""
