"""The longer commands of `flap`; `__main__` registers them."""
