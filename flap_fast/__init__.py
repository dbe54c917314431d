"""flap_fast."""
