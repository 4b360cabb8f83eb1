"""A trainer of a small model, and batches for it."""

import numpy as np
from mlx.utils import tree_flatten
from support import random_tokens, small_model

from mlx_dgemma.distributed.group import ALONE
from mlx_dgemma.tune.config import TrainerConfig
from mlx_dgemma.tune.objective import VARIANTS, Batch
from mlx_dgemma.tune.trainer import Trainer

QUICK = {"rank": 2, "alpha": 4.0, "learning_rate": 0.01, "steps": 6, "warmup": 1}


def batch_of(number, rows=2):
    tokens, canvas = np.array(random_tokens(number, rows, 7)), np.array(random_tokens(number + 100, rows, 4))
    return Batch(tokens, np.ones(tokens.shape, bool), canvas, np.ones(canvas.shape, bool))


def trainer(group=ALONE, **changes):
    return Trainer(small_model(0), TrainerConfig(**{**QUICK, **changes}), VARIANTS["google"], group)


def weights(model):
    return {path: np.array(a) for path, a in tree_flatten(model.parameters())}
