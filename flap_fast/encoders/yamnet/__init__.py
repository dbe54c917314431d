"""YAMNet, a small audio encoder whose trained weights are public."""
