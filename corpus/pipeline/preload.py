"""What every worker imports, so that it is imported once."""

import corpus.pipeline.blocks  # noqa: F401
from corpus.indexed import quiet_import

with quiet_import():
    import megatron.core.datasets.indexed_dataset  # noqa: F401
