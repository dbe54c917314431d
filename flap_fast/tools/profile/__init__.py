"""A training step measured on this machine, and predicted for others."""
