"""Fine-tuning: data, objective, and the loop; `mlx-dgemma tune`."""

from __future__ import annotations
