"""Training, evaluation and generation: the training loop, metrics, run directories and console output."""
