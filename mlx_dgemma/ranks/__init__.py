"""Several ranks, one answer: rank 0 runs the command and tells the others what to compute with it."""
