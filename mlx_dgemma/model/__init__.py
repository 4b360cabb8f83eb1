"""The model: configuration, layers, attention, experts, vision, the KV cache and the head."""
