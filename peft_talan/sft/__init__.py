"""What the programs do with a data file: read it, train on it, score models on it, compare adapters."""
