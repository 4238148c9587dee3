"""The names and logical shapes of a model's parameters, computed without allocating them."""

from conf.schema import ModelConfig


def logical_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name in a checkpoint -> logical shape of every parameter, including those that are set by a rule. Call it in a
    process without process groups, with output redirected (training.output_redirect)."""
    import torch

    from parallel import megatron_compat

    megatron_compat.load()
    from models.decoder import ModelBuildContext, ModelChunk
    from models.megatron_config import transformer_config
    from parallel.layout import Layout
    from parallel.local_launcher import fake_rank
    from parallel.sharding import logical_name

    with fake_rank(Layout(1), 0) as runtime:
        core = transformer_config(model, runtime, torch.float32, deterministic=False)
        context = ModelBuildContext(model, core, runtime, seed=0)
        chunk = ModelChunk(context, chunk=0, sequence_length=8, document_mask=False)
        return {logical_name(n, p): p.sharding.logical_shape(p.shape) for n, p in chunk.named_parameters()}
