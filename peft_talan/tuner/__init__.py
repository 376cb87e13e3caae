"""What PEFT sees: the model, its layers on the decoder blocks, and one file for each of PEFT's features."""
