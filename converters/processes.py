"""The processes that `accelerate launch` started, which share a conversion's layers.

A layer's statistics, dims and fit need nothing of another layer's, so each process takes every
n-th layer and hands it on as a file in the work folder. What it takes is what one process would
have made of it with as many threads, so the result has the same bytes. Messages are few and small,
and go by gloo whatever the device, unless the caller has set up another backend.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeVar

import torch

from .errors import InputError

# A process may wait for another one's layer, which takes hours where models are largest.
PATIENCE = timedelta(days=30)

T = TypeVar("T")


class OtherFailed(Exception):
    """Another process ended: it has said why, or was killed."""


class Processes:
    """Those of this run, as the environment says: `index` of this one, `count` of all."""

    def __init__(self) -> None:
        self.index, self.count = 0, int(os.environ.get("WORLD_SIZE", "1"))
        if self.count > 1:
            self.index = self._state.process_index

    @cached_property
    def _state(self):
        from accelerate import PartialState

        return PartialState(cpu=True, timeout=PATIENCE)

    @property
    def first(self) -> bool:
        """Whether this is the one that prepares, writes and speaks."""
        return self.index == 0

    def takes(self, layer: int) -> bool:
        return layer % self.count == self.index

    def wait(self) -> None:
        """Until all are here.

        Raises:
            OtherFailed: one of them never comes.
        """
        if self.count > 1:
            try:
                self._state.wait_for_everyone()
            except RuntimeError as error:
                raise OtherFailed from error

    @contextmanager
    def first_alone(self) -> Iterator[None]:
        """The others come after: what the first one refuses, it refuses alone."""
        if not self.first:
            self.wait()
        yield
        if self.first:
            self.wait()

    def of_first(self, item: T | None = None) -> T:
        """The first one's item, given by it to all; the others give none.

        Raises:
            OtherFailed: it never comes.
        """
        items = [item]
        if self.count > 1:
            from accelerate.utils import broadcast_object_list

            try:
                broadcast_object_list(items)
            except RuntimeError as error:
                raise OtherFailed from error
        return items[0]  # type: ignore[return-value]

    @contextmanager
    def scratch(self) -> Iterator[Path]:
        """A folder for all of them, who must be on one machine, until the first one leaves it."""
        with TemporaryDirectory(prefix="rehead-") as folder:
            yield self.of_first(Path(folder))

    def own(self, device: torch.device) -> torch.device:
        """This process's device of that type.

        Raises:
            InputError: one device is named for several processes, or there are too few.
        """
        if self.count == 1 or device.type == "cpu":
            return device
        if device.index is not None:
            raise InputError(
                f"--device {device} is one device, and {self.count} processes were launched. "
                f"Give --device {device.type}: each takes its own."
            )
        there, mine = (
            torch.get_device_module(device).device_count(),
            self._state.local_process_index,
        )
        if mine >= there:
            raise InputError(
                f"{self.count} processes were launched, and {there} {device.type} devices are "
                "here. Launch one for each."
            )
        return torch.device(device.type, mine)
