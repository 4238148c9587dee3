"""The names and logical shapes of a model's parameters, computed without allocating them."""

from conf.schema import ModelConfig


def logical_shapes(model: ModelConfig, *, states: bool = True, matrices: bool = False) -> dict[str, tuple[int, ...]]:
    """Name in a checkpoint -> logical shape of every parameter. Call it in a process without process groups, with
    output redirected (training.output_redirect).

    Args:
        states: include parameters that are set by a rule (Sharding.is_state).
        matrices: only those that are matrices of hidden layers (Sharding.matrices).
    """
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
        return {
            logical_name(name, parameter): parameter.sharding.logical_shape(parameter.shape)
            for name, parameter in chunk.named_parameters()
            if (states or not parameter.sharding.is_state) and (not matrices or parameter.sharding.matrices is not None)
        }
