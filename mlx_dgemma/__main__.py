"""`python -m mlx_dgemma` is `mlx-dgemma`."""

from .cli.calls.start import main

if __name__ == "__main__":
    main()
