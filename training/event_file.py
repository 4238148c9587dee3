"""Writes TensorBoard event files in the calling thread, so that disk errors are raised by the call, with one record for
all values of a step. torch's SummaryWriter writes in a thread, whose traceback would go to the terminal."""

import io
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

_FLUSH_SECONDS = 30.0


class EventFile:
    """A new event file in `folder`, which is created if needed.

    Args:
        purge_step: TensorBoard ignores values of earlier event files in the folder from this step on.

    Raises:
        OSError: by every method, if the file cannot be written.
    """

    def __init__(self, folder: Path, *, purge_step: int) -> None:
        # Imported here, since the import is slow.
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._new_event, self._summary = Event, Summary
        folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{time.time():010.0f}.{os.uname().nodename}.{os.getpid()}.{time.monotonic_ns()}"
        self._file = (folder / name).open("wb")
        self._records = RecordWriter(self._file)
        self._flushed = float("-inf")
        self._write(Event(file_version="brain.Event:2"))
        self._write(Event(step=purge_step, session_log=SessionLog(status=SessionLog.START)))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Writes values of one step, by tag."""
        found = [self._summary.Value(tag=tag, simple_value=float(value)) for tag, value in values.items()]
        self._write(self._new_event(step=step, summary=self._summary(value=found)))

    def image(self, step: int, tag: str, picture: np.ndarray) -> None:
        """`picture`: uint8 [height, width, 3]."""
        from PIL import Image

        encoded = io.BytesIO()
        Image.fromarray(picture).save(encoded, format="PNG")
        height, width, channels = picture.shape
        image = self._summary.Image(
            height=height, width=width, colorspace=channels, encoded_image_string=encoded.getvalue()
        )
        value = self._summary.Value(tag=tag, image=image)
        self._write(self._new_event(step=step, summary=self._summary(value=[value])))

    def layout(self, charts: Mapping[str, Mapping[str, str]]) -> None:
        """Defines charts with several series each on the page "custom scalars": category -> title -> pattern of
        tags."""
        from torch.utils.tensorboard.summary import custom_scalars

        pages = {name: {title: ["Multiline", [tags]] for title, tags in page.items()} for name, page in charts.items()}
        self._write(self._new_event(summary=custom_scalars(pages)))

    def close(self) -> None:
        self._file.close()

    def _write(self, event: Any) -> None:
        event.wall_time = time.time()
        self._records.write(event.SerializeToString())
        if time.monotonic() - self._flushed > _FLUSH_SECONDS:
            self._file.flush()
            self._flushed = time.monotonic()
