"""Enrich captions: an audio tagger, a prompt, a language model and a filter."""
