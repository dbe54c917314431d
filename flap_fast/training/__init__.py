"""Training: the loop, its engines, optimizers, checkpoints and observers."""
