"""Orders gathers and loads with vLLM's forward pass: at once on a CPU, on a stream of our own on CUDA.

On CUDA a layer's KV is gathered behind that layer and beside the next ones. Nothing waits on the host, and the
compute stream waits for the gathers at the end of the step, so that no block is reused before it was read.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch


class Ordering(Protocol):
    """How work on KV is ordered with the engine's own."""

    def gathering(self) -> AbstractContextManager[object]:
        """Around reads of blocks that the engine has just written."""

    def after_load(self, action: Callable[[], None]) -> None:
        """Run ``action`` once the loads issued so far are in the blocks: now, or by the end of the step."""

    def end_of_step(self) -> None:
        """No block may be reused before the gathers of this step have read it."""


class Inline:
    """CPU: everything is done when the call returns."""

    def gathering(self) -> AbstractContextManager[object]:
        """See ``Ordering``."""
        return nullcontext()

    def after_load(self, action: Callable[[], None]) -> None:
        """See ``Ordering``."""
        action()

    def end_of_step(self) -> None:
        """See ``Ordering``."""


class SideStream:
    """CUDA."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._used = False
        self._loads: list[tuple[torch.cuda.Event, Callable[[], None]]] = []

    def gathering(self) -> AbstractContextManager[object]:
        """See ``Ordering``."""
        self._side.wait_stream(torch.cuda.current_stream(self._device))
        self._used = True
        return torch.cuda.stream(self._side)

    def after_load(self, action: Callable[[], None]) -> None:
        """See ``Ordering``."""
        self._loads.append((torch.cuda.current_stream(self._device).record_event(), action))

    def end_of_step(self) -> None:
        """See ``Ordering``."""
        if self._used:
            torch.cuda.current_stream(self._device).wait_stream(self._side)
            self._used = False
        # Loads come before the forward pass that has just been launched: this waits for them alone.
        loads, self._loads = self._loads, []
        for event, action in loads:
            event.synchronize()
            action()
