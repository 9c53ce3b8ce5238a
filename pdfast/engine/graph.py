"""An update as one CUDA graph: what the device does is recorded once and replayed, so that the host costs nothing."""

import warnings
from collections import deque
from collections.abc import Callable

import torch

from pdfast.engine.world import World

PLAIN_CALLS = 2  # before the recording: kernels are compiled, caches filled, gradients allocated
AHEAD = 2  # calls that the host may be ahead of the device: more would only delay a stop


class Replayed:
    """`function`, which takes and returns nothing and works on tensors that stay where they are, as a CUDA graph.

    The first calls run it plainly. Where it cannot be recorded it always runs plainly, after one warning with the reason;
    on a CPU, without. A call returns while the device works.
    """

    def __init__(self, function: Callable[[], None], world: World, wanted: bool = True) -> None:
        self._function, self._calls = function, 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._on_gpu = world.device.type == "cuda"
        self._under_way: deque[torch.cuda.Event] = deque()
        self._plain = not (self._on_gpu and wanted)
        if not self._plain and world.size > 1:
            self._refuse("its collectives are of several processes")

    def _refuse(self, reason: str) -> None:
        self._plain = True
        warnings.warn(f"updates run without a CUDA graph: {reason}", stacklevel=3)

    def __call__(self) -> None:
        if self._on_gpu and len(self._under_way) >= AHEAD:
            self._under_way.popleft().synchronize()
        self._run()
        if self._on_gpu:
            self._under_way.append(torch.cuda.Event())
            self._under_way[-1].record()

    def _run(self) -> None:
        if self._graph is not None:
            self._graph.replay()
            return
        if self._plain:
            self._function()
            return
        self._calls += 1
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            if self._calls <= PLAIN_CALLS:
                self._function()
        torch.cuda.current_stream().wait_stream(stream)
        if self._calls > PLAIN_CALLS:
            self._record()

    def _record(self) -> None:
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                self._function()
        except RuntimeError as error:
            torch.cuda.synchronize()
            self._refuse(str(error).splitlines()[0])
            self._function()
            return
        self._graph = graph
        graph.replay()  # recording runs nothing
