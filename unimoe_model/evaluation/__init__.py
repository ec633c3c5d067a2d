"""Evaluation of trained models: metrics and routing statistics."""
