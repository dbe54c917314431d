"""CLIP's ResNet."""
