"""FLAP's ViT over the patches of a log-mel."""
