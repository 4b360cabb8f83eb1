"""Fine-tuning: data, objective, and the loop; `mlx-dgemma tune`."""
