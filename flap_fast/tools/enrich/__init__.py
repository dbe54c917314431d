"""Captions -> richer captions: what is heard, a prompt, a language model, a filter."""
