"""The batches of a training run, read ahead of the steps that use them."""

from conf.schema import Config
from corpus.read_ahead import ReadAhead
from corpus.stream import Stream, micro_batches
from parallel.objective import Batch
from parallel.process_groups import Groups


def read_batches(
    config: Config, stream: Stream, groups: Groups, *, first_sample: int, steps: int
) -> ReadAhead[list[Batch]]:
    """This rank's micro-batches of the next `steps` steps.

    Args:
        first_sample: the position in the training stream.
    """
    train, dp = config.train, groups.dp.size()

    def load(first: int) -> list[Batch]:
        return list(
            micro_batches(
                stream,
                first_sample=first,
                micro_batch_size=train.micro_batch_size,
                num_micro_batches=train.global_batch_size // (train.micro_batch_size * dp),
                dp_rank=groups.dp.rank(),
                dp_size=dp,
            )
        )

    end = first_sample + steps * train.global_batch_size
    return ReadAhead(load, range(first_sample, end, train.global_batch_size), depth=config.data.read_ahead)
