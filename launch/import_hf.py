"""`python -m launch.import_hf source=DIR output=RUN`: converts a Hugging Face model to a run directory, for
checkpoint.load, launch.evaluate and launch.generate (docs/hugging_face.md)."""

from conf.commands import ImportConfig
from launch.cli import command


def main(config: ImportConfig) -> int:
    """Imports the model. Returns the exit code: 1 if the two models compute different results.

    Raises:
        ValueError: the source has unsupported settings, or missing or unexpected tensors.
    """
    from training.hf_import import import_model

    return import_model(config)


if __name__ == "__main__":
    command(ImportConfig, "import_hf", main)
