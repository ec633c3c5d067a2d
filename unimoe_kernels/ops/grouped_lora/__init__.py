"""The operator `grouped_lora`."""
