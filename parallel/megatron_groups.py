"""Gives Megatron-Core the process groups that parallel.process_groups has made, instead of its own."""

from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from parallel.layout import Layout

if TYPE_CHECKING:
    from parallel.process_groups import Groups


def set_parallel_state(groups: "Groups", layout: Layout) -> None:
    """Sets Megatron-Core's globals to the process groups of this rank. Its own initialize_model_parallel makes every
    group of the world on every rank, also those of seven kinds that nothing here uses. The globals of these are None,
    for which Megatron-Core says that the group is not initialized; only a world of one rank has one group for all."""
    from megatron.core import parallel_state

    alone = groups.world if layout.world == 1 else None
    by_name = {
        "TENSOR_MODEL_PARALLEL": groups.tp,
        "PIPELINE_MODEL_PARALLEL": groups.pp,
        "DATA_PARALLEL": groups.dp,
        "CONTEXT_PARALLEL": groups.cp,
        "EMBEDDING": groups.embedding,
        "TENSOR_AND_CONTEXT_PARALLEL": groups.tp_cp,
        "EXPERT_MODEL_PARALLEL": groups.ep,
        "EXPERT_TENSOR_PARALLEL": groups.etp,
        "EXPERT_DATA_PARALLEL": groups.edp,
        "INTRA_PARTIAL_EXPERT_DATA_PARALLEL": groups.optimizer_edp,
        "INTER_PARTIAL_EXPERT_DATA_PARALLEL": groups.optimizer_replicas,
        "INTRA_DISTRIBUTED_OPTIMIZER_INSTANCE": groups.world,
        "MODEL_PARALLEL": alone,
        "POSITION_EMBEDDING": alone,
        "TENSOR_AND_DATA_PARALLEL": alone,
        "EXPERT_TENSOR_AND_MODEL_PARALLEL": alone,
        "EXPERT_TENSOR_MODEL_PIPELINE_PARALLEL": alone,
    }
    values: dict[str, Any] = {f"_{name}_GROUP": group for name, group in by_name.items()}
    values["_DATA_PARALLEL_GROUP_WITH_CP"] = groups.dp_cp
    values["_INTRA_PARTIAL_DATA_PARALLEL_GROUP_WITH_CP"] = groups.optimizer_dp_cp
    values["_TENSOR_AND_DATA_PARALLEL_GROUP_WITH_CP"] = alone
    # Since 0.19 the data-parallel groups have a second name, for sharding that nothing here uses.
    twice = {f"{name}_WITH_GTP_REMAT": group for name, group in values.items() if "DATA_PARALLEL_GROUP" in name}
    values |= {name: group for name, group in twice.items() if hasattr(parallel_state, name)}
    members = {
        "_TENSOR_MODEL_PARALLEL_GLOBAL_RANKS": groups.tp,
        "_PIPELINE_GLOBAL_RANKS": groups.pp,
        "_DATA_PARALLEL_GLOBAL_RANKS": groups.dp,
        "_DATA_PARALLEL_GLOBAL_RANKS_WITH_CP": groups.dp_cp,
        "_CONTEXT_PARALLEL_GLOBAL_RANKS": groups.cp,
        "_EXPERT_MODEL_PARALLEL_RANKS": groups.ep,
        "_EMBEDDING_GLOBAL_RANKS": groups.embedding,
        "_MODEL_PARALLEL_GLOBAL_RANKS": alone,
        "_POSITION_EMBEDDING_GLOBAL_RANKS": alone,
    }
    values |= {name: group and dist.get_process_group_ranks(group) for name, group in members.items()}
    if layout.vpp > 1:
        values["_VIRTUAL_PIPELINE_MODEL_PARALLEL_RANK"] = 0
        values["_VIRTUAL_PIPELINE_MODEL_PARALLEL_WORLD_SIZE"] = layout.vpp
    values["_global_process_group_list"] = [None, *{id(group): group for _, group in groups.named()}.values()]
    for name, value in values.items():
        assert hasattr(parallel_state, name), name
        setattr(parallel_state, name, value)
    parallel_state._set_global_memory_buffer()  # pyright: ignore[reportPrivateUsage]


def optimizer_groups(groups: "Groups") -> Any:
    """The `pg_collection` of get_megatron_optimizer. Without it the optimizer asks for two groups more (mp and
    tp_ep_pp), which it does not communicate over: their ranks are part of a name in its own checkpoints."""
    from megatron.core.process_groups_config import ProcessGroupCollection

    return ProcessGroupCollection(
        tp=groups.tp,
        dp=groups.dp,
        dp_cp=groups.dp_cp,
        expt_dp=groups.edp,
        intra_dp_cp=groups.optimizer_dp_cp,
        intra_expt_dp=groups.optimizer_edp,
        inter_dist_opt=groups.optimizer_replicas,
        expt_tp=groups.etp,
        intra_dist_opt=groups.world,
        mp=None,
        tp_ep_pp=None,
    )
