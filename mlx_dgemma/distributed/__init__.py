"""Several processes that compute one model: their group, and how weights are dealt to them."""
