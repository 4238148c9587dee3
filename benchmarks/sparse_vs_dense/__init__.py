"""The study of sparse against dense models at equal active FLOPs per token: `python -m benchmarks.sparse_vs_dense`."""
