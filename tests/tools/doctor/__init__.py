"""Data and runs with faults that `flap doctor` must name, and without."""
