"""LoRA and DoRA adapters: in a model, in PEFT's file layout, and fused into a checkpoint."""
