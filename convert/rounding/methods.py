"""The names of the ways to round. This module is plain data and does not import MLX."""

NEAREST = "nearest"
METHODS = {
    NEAREST: "every weight takes the nearest code",
    "gptq": "codes by GPTQ, on what the source's denoising steps compute",
}
