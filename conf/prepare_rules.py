"""Rules of the settings of launch.prepare."""

from conf.commands import PrepareConfig, PrepareSlurmConfig

EXECUTORS = ("local", "slurm", "ray")
_LEAST = {"workers": 1, "samples": 0, "slurm.cpus_per_task": 1, "slurm.mem_per_cpu_gb": 1}


def check_prepare(config: PrepareConfig) -> None:
    """Raises ValueError for settings that are out of bounds or would have no effect."""
    if config.executor is not None and config.executor not in EXECUTORS:
        raise ValueError(f"executor={config.executor} is not one of {', '.join(EXECUTORS)}")
    for key, least in _LEAST.items():
        value = getattr(config.slurm if "." in key else config, key.split(".")[-1])
        if value < least:
            raise ValueError(f"{key}={value} must be >= {least}; the nearest is {key}={least}")
    if not config.task_mib > 0:
        raise ValueError(f"task_mib={config.task_mib} must be > 0; the default is task_mib=256")
    if config.executor is None:
        if config.prepare.steps:
            raise ValueError("prepare.steps need an executor: add executor=local")
        default = PrepareConfig()
        for key in ("workers", "task_mib", "samples"):
            if getattr(config, key) != getattr(default, key):
                raise ValueError(f"{key} has no effect without executor; add executor=local")
    if config.executor != "slurm" and config.slurm != PrepareSlurmConfig():
        raise ValueError("the settings of slurm have no effect without executor=slurm")
    for option in config.slurm.sbatch:
        if not option.startswith("--") or "=" not in option:
            raise ValueError(f"slurm.sbatch: {option} is not of the form --NAME=VALUE")
