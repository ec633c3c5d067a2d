"""The stages of Uni-MoE's training, resumable and deterministic."""
