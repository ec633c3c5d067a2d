"""Studies: variants of a recipe trained with several seeds, and claims tested on the results."""
