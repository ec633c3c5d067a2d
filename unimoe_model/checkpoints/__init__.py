"""Conversion of published checkpoints, and assembly of MoE checkpoints from dense models."""
