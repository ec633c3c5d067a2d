"""Ways into other packages; each imports the other package when it is called."""

from unimoe_kernels.integrations.transformers import register_with_transformers
from unimoe_kernels.integrations.upcycle import load_upcycled, upcycle

__all__ = ["load_upcycled", "register_with_transformers", "upcycle"]
