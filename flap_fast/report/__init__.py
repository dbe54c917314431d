"""Figures and reports of runs; reads run folders. Only the CLI imports it."""
