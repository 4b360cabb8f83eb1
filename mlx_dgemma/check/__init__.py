"""`mlx-dgemma check`: what this machine computes, compared with what it should, and how fast it does."""
