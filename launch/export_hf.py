"""`python -m launch.export_hf checkpoint=RUN output=DIR`: a Hugging Face model from a checkpoint, for
AutoModelForCausalLM.from_pretrained and whatever else reads the hub's names (docs/hugging_face.md)."""

from conf.commands import ExportConfig
from launch.cli import command


def main(config: ExportConfig) -> int:
    """Returns the exit code: 1 where the two models turn out not to compute the same.

    Raises:
        ValueError: no such checkpoint, or a model that no family of Transformers has.
    """
    from training.hf_export import export_model

    return export_model(config)


if __name__ == "__main__":
    command(ExportConfig, "export_hf", main)
