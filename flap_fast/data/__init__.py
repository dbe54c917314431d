"""Shards -> batches: random reads, sampling, decoding, front ends, tokens."""
