"""Side by side with other people's packages, on real sounds; each is left out if not installed."""
