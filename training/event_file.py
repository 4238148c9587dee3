"""TensorBoard's event files, written in the calling thread: an error of the disk shows at the call that meets it, and
all values of a step are one record. torch's SummaryWriter writes from a thread, whose traceback goes to the screen."""

import io
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

_FLUSH_SECONDS = 30.0


class EventFile:
    """An event file of its own in `folder`, which is made.

    Args:
        purge_step: TensorBoard leaves out what earlier event files of the folder say of this step and later ones.

    Raises:
        OSError: by every method: the disk does not take it.
    """

    def __init__(self, folder: Path, *, purge_step: int) -> None:
        # Here rather than above: only a run that starts should pay for the import.
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
        """Tag -> value, all of one step."""
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
        """Charts of several series each, on the page "custom scalars": category -> title -> pattern of the tags."""
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
