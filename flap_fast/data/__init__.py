"""Audio files and captions -> batches: manifest, shards, decoding, log-mels, tokens."""
