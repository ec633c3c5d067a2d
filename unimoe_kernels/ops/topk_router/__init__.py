"""The operator `topk_router`."""
