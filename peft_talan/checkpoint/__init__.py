"""Files in and out: what they must hold, the names in them, the model card, and the low-rank half as plain LoRA."""
