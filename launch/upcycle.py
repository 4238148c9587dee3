"""`python -m launch.upcycle checkpoint=RUN output=NEW`: a sparse model from a dense one, for checkpoint.load."""

from conf.commands import UpcycleConfig
from launch.cli import command


def main(config: UpcycleConfig) -> int:
    """Returns the exit code: 1 where the sparse model does not compute what the dense one does although it should.

    Raises:
        ValueError: the checkpoint is of a sparse model, or the sizes do not divide.
    """
    from training.upcycle import upcycle

    return upcycle(config)


if __name__ == "__main__":
    command(UpcycleConfig, "upcycle", main)
