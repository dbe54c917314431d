"""What `flap` does, where a command is longer than a few lines; `__main__` registers them."""
