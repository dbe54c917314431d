"""CLIP's text transformer."""
