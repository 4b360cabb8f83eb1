"""`python -m mlx_dgemma.convert` runs `mlx-dgemma convert`."""

from .cli import convert

if __name__ == "__main__":
    convert(prog_name="python -m mlx_dgemma.convert")
