"""Terms -> ZeRO step -> checkpoint: the loop, its engines, and what watches it."""
