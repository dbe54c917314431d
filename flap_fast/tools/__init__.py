"""What people do with a model or data: embed, search, enrich, profile."""
