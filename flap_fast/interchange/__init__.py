"""Checkpoints of other projects -> model folders, and back; files are read as tensors only."""
