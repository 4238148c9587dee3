"""What every worker imports, so that it is imported once."""

import corpus.pipeline.blocks  # noqa: F401
