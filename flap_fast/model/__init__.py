"""Batches -> embeddings: the two encoders and their heads, masking, the decoder, model folders."""
