"""HTSAT, LAION-CLAP's audio encoder."""
