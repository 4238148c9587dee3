"""The batches of a training run, read ahead of the steps that use them."""

from dataclasses import replace

from conf.schema import Config
from corpus.read_ahead import ReadAhead
from corpus.stream import BatchShard, Stream
from parallel.objective import Batch
from parallel.process_groups import Groups


def read_batches(
    config: Config, stream: Stream, groups: Groups, *, first_sample: int, steps: int
) -> ReadAhead[list[Batch]]:
    """This rank's micro-batches of the next `steps` steps.

    Args:
        first_sample: the position in the training stream.
    """
    train, dp = config.train, groups.dp
    end = first_sample + steps * train.global_batch_size
    shard = BatchShard(
        first_sample,
        train.micro_batch_size,
        num_micro_batches=train.global_batch_size // (train.micro_batch_size * dp.size()),
        dp_rank=dp.rank(),
        dp_size=dp.size(),
    )
    requested = first_sample

    def load(first: int) -> list[Batch]:
        nonlocal requested
        last = min(first + 2 * config.data.read_ahead * train.global_batch_size, end - 1)
        while requested <= last:  # of this step, and of twice as many later ones as are held ready
            replace(shard, first_sample=requested).request(stream)
            requested += train.global_batch_size
        return list(replace(shard, first_sample=first).micro_batches(stream))

    return ReadAhead(load, range(first_sample, end, train.global_batch_size), depth=config.data.read_ahead)
