"""LoRA and DoRA: changes of a model's weights, PEFT's file layout, and fusing them into a checkpoint."""
