"""`python -m launch.import_megatron source=DIR output=RUN model=NAME [model.KEY=VALUE ...]`: converts the weights of a
checkpoint of Megatron-Core's GPTModel to a run directory, for checkpoint.load (docs/hugging_face.md)."""

from conf.commands import ImportMegatronConfig
from launch.cli import command


def main(config: ImportMegatronConfig) -> int:
    """Imports the model. Returns the exit code.

    Raises:
        ValueError: the source cannot be read, or its tensors are not those of the model.
    """
    from training.megatron_import import import_model

    return import_model(config)


if __name__ == "__main__":
    command(ImportMegatronConfig, "import_megatron", main)
