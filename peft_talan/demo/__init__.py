"""The main job at small size: fine-tune a real model with LoRA and with LoRA+TALAN, compare, save, reload, ask."""
