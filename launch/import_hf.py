"""`python -m launch.import_hf source=DIR output=RUN`: a run directory from a Hugging Face model, which
checkpoint.load, launch.evaluate and launch.generate take (docs/hugging_face.md)."""

from conf.commands import ImportConfig
from launch.cli import command


def main(config: ImportConfig) -> int:
    """Returns the exit code: 1 where the two models turn out not to compute the same.

    Raises:
        ValueError: the source has something that is not understood, lacks something or has too much.
    """
    from training.hf_import import import_model

    return import_model(config)


if __name__ == "__main__":
    command(ImportConfig, "import_hf", main)
