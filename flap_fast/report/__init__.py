"""Figures of what a run sees and does; reads run folders, and nothing imports it but the CLI."""
