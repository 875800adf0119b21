"""Language models: hidden states at chosen positions, the frozen teacher, and prefixes that are read once."""
