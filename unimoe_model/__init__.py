"""Uni-MoE (arXiv 2405.11273), small: one model for text, pictures, video, speech and audio.

Importing this package loads nothing heavy; import what you need from its modules.
`unimoe_model.auto.register_auto_classes()` lets transformers' Auto classes load its checkpoints.
"""
