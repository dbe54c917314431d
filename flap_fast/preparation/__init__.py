"""Manifests and published data sets -> WebDataset shards."""
