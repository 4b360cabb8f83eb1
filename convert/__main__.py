"""`python -m mlx_dgemma.convert` runs `mlx-dgemma convert`."""

from .cli import command

if __name__ == "__main__":
    command(prog_name="python -m mlx_dgemma.convert")
