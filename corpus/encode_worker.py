"""A worker process of `corpus.encoder.EncoderPool`: python -m corpus.encode_worker DESCRIPTOR

It reads pickled batches from a socket and writes their tokens to it: the length of each piece, int64, then all ids. A
thread receives the next batch meanwhile. It ends when the other end of the socket is closed.
"""

import os
import pickle
import signal
import sys
import threading
from contextlib import suppress
from multiprocessing.connection import Connection
from queue import SimpleQueue

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
"""Sent to all processes of a terminal or a job: what follows from them is decided by the process that tokenises."""


def main(descriptor: int) -> None:
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    connection = Connection(descriptor)
    received: SimpleQueue[bytes] = SimpleQueue()

    def receive() -> None:
        with suppress(EOFError, OSError):
            while True:
                received.put(connection.recv_bytes())
        os._exit(0)  # nobody waits for a result any more

    threading.Thread(target=receive, daemon=True).start()
    tokenizer, dtype = pickle.loads(received.get())
    with suppress(BrokenPipeError, ConnectionResetError):
        while True:
            texts, last = pickle.loads(received.get())
            tokens_N, lengths_P = tokenizer.encode_pieces(texts, last, dtype)
            connection.send_bytes(lengths_P.tobytes() + tokens_N.tobytes())


if __name__ == "__main__":
    main(int(sys.argv[1]))
