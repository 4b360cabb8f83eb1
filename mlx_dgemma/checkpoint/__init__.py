"""Checkpoints on disk: finding them, reading their headers, building the model, and the memory that it needs."""
