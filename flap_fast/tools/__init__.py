"""Tools for models and data: embed, search, enrich, profile."""
