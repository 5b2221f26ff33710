"""Which of several processes this is, and whether each of them knows of the others."""

import os

from simpler_distil_whisper.config import ConfigError

# In these variables other launchers count the processes that they start.
OTHER_LAUNCHERS = {
    "SLURM_STEP_NUM_TASKS": "srun",
    "OMPI_COMM_WORLD_SIZE": "mpirun",
    "PMI_SIZE": "mpiexec",
}
OF_TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def check_launch() -> None:
    """Make sure that each of several processes knows of the others, or each would do all the work.

    Raises:
        ConfigError: they were not started by torchrun, and something is missing that it would set.
    """
    if "RANK" in os.environ or "WORLD_SIZE" in os.environ:
        if "SLURM_LOCALID" in os.environ:
            os.environ.setdefault("LOCAL_RANK", os.environ["SLURM_LOCALID"])
        missing = [name for name in OF_TORCHRUN if not os.environ.get(name)]
        if missing and os.environ.get("WORLD_SIZE") != "1":
            raise ConfigError(
                f"RANK or WORLD_SIZE is set, but not {', '.join(missing)}: launch with torchrun, "
                "which sets all of them, or unset them to use one process"
            )
        return
    for variable, launcher in OTHER_LAUNCHERS.items():
        if (count := os.environ.get(variable, "1")) != "1":
            raise ConfigError(
                f"{launcher} has started {count} processes, which do not know of one another: let "
                "it start one torchrun per machine, and torchrun one process per GPU (see "
                "docs/troubleshooting.md)"
            )


def process_rank() -> int:
    """Return this process's number among those that torchrun or accelerate launched, from 0."""
    return int(os.environ.get("RANK") or 0)


def process_count() -> int:
    """Return how many processes torchrun or accelerate launched."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def is_main_process() -> bool:
    """Return whether this process writes the files that exist once per run."""
    return process_rank() == 0
