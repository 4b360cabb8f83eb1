"""Better rounding at given bits: codes, scales and biases chosen for what the source model computes."""
