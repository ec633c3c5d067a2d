"""Ways into other packages; each imports the other package when it is called."""

from unimoe_kernels.integrations.transformers import register_with_transformers

__all__ = ["register_with_transformers"]
