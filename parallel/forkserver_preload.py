"""Preloaded by the fork server, so that forked ranks need not import Megatron-Core, which takes seconds.

This module must not start threads or initialize CUDA (torch.cuda.is_available() does): an initialized driver cannot be
used in forked processes. Where there may be a GPU, ranks are therefore not forked (parallel.local_launcher). Each rank
installs the CPU patches after the fork.
"""

import logging
import warnings

logging.disable(logging.WARNING)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from parallel import megatron_compat

    megatron_compat.import_core()
logging.disable(logging.NOTSET)
