"""`python -m launch.export_hf checkpoint=RUN output=DIR`: converts a checkpoint to a Hugging Face model, for
AutoModelForCausalLM.from_pretrained and other programs that read the format (docs/hugging_face.md)."""

from conf.commands import ExportConfig
from launch.cli import command


def main(config: ExportConfig) -> int:
    """Exports the model. Returns the exit code: 1 if the two models compute different results.

    Raises:
        ValueError: no such checkpoint, or a model that fits no supported family.
    """
    from training.hf_export import export_model

    return export_model(config)


if __name__ == "__main__":
    command(ExportConfig, "export_hf", main)
