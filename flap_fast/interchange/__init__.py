"""Checkpoints of other projects -> model folders, and back; tensors alone are ever read."""
