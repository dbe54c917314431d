"""Batches -> embeddings: patches, masking, the two towers."""
