"""Frozen, pretrained encoders: what the model sees and hears with."""
