"""Experts on several ranks: rows to them and back, weights and gradients beside them."""
