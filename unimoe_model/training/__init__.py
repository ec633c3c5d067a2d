"""Training in stages, resumable and deterministic."""
