"""Fine-tuning and evaluation: data, objective, trainer and the whole run behind `mlx-dgemma tune`."""
