"""Imported once by the fork server that ranks are forked from: the engine takes seconds to import, a fork none.
Nothing here may start a thread or ask for a device: a CUDA driver that was initialised before a fork, which
torch.cuda.is_available() does, is unusable in every rank. Where there may be a GPU, nothing is forked for that reason
(parallel.local_launcher). Each rank installs the CPU patches after its fork."""

import logging
import warnings

logging.disable(logging.WARNING)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from parallel import megatron_compat

    megatron_compat.import_core()
logging.disable(logging.NOTSET)
