"""Experts on several ranks: dispatch of rows, and their weights and gradients."""
