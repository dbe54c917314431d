"""A transformers text encoder: RoBERTa, BERT and others."""
