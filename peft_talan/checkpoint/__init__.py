"""Files in and out: what they must hold, the names in them, the model card, and the LoRA weights as plain LoRA."""
