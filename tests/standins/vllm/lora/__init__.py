"""LoRA of the stand-in."""
