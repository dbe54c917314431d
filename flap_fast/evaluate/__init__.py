"""Checkpoint -> scores."""
