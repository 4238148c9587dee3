"""Distributed training on Megatron-Core: parallel layouts, process groups, the engine, checkpoints and local ranks."""
