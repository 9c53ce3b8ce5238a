"""An update as one CUDA graph: what the device does is recorded once and replayed, so that the host costs nothing."""

import contextlib
import warnings
from collections import deque
from collections.abc import Callable

import torch

from pdfast.engine.world import World

PLAIN_CALLS = 2  # before the recording: kernels are compiled, caches filled, gradients allocated
AHEAD = 2  # calls that the host may be ahead of the device: more would only delay a stop


class CUDAGraphed:
    """`function`, which takes and returns nothing and works on tensors that stay where they are, as a CUDA graph.

    The first calls run it plainly. Where it cannot be recorded it always runs plainly, after one warning with the reason;
    on a CPU, without. A call returns while the device works.
    """

    def __init__(self, function: Callable[[], None], world: World, wanted: bool = True) -> None:
        self._function, self._calls = function, 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._stream: torch.cuda.Stream | None = None
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
        if self._calls <= PLAIN_CALLS:
            self._aside()
        else:
            self._record()

    def _aside(self) -> None:
        """Run the function on the stream that will be recorded: memory belongs to the stream that it was allocated on, and
        that of another one would not be used again."""
        current = torch.cuda.current_stream()
        self._stream = self._stream or torch.cuda.Stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            self._function()
        current.wait_stream(self._stream)

    def _record(self) -> None:
        graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
        current, failure = torch.cuda.current_stream(), None
        try:
            # Only what this thread does may be an error: others decode images and write checkpoints meanwhile.
            with torch.cuda.graph(graph, pool, self._stream, capture_error_mode="thread_local"):
                try:
                    self._function()
                except BaseException as error:
                    failure = error  # it may spoil the recording, whose end is an error of its own then
                    raise
        except BaseException as error:
            torch.cuda.set_stream(current)  # which a recording that was spoilt leaves to others
            if error is not failure:
                _forget(pool)
                _end_of_recording(self._stream)
            failure = failure or error
            if not isinstance(failure, Exception):
                raise failure from None
        if failure is None:
            self._graph = graph
            graph.replay()  # recording runs nothing
            return
        reason = _reason(failure)
        del graph, failure  # and, with its frames, what the recording had allocated
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        self._refuse(reason)
        self._function()


def _forget(pool: tuple[int, int]) -> None:
    """Give back the memory of a recording that did not come to its end, as its end would have."""
    device = torch.cuda.current_device()
    with contextlib.suppress(RuntimeError, AttributeError):  # they are not public
        torch._C._cuda_endAllocateToPool(device, pool)
        torch._C._cuda_releasePool(device, pool)


def _end_of_recording(stream: torch.cuda.Stream | None) -> None:
    """Record an operation, whose end tells the generators of random numbers too that nothing is recorded any more."""
    graph = torch.cuda.CUDAGraph()
    with contextlib.suppress(RuntimeError), torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        torch.cuda._sleep(1)


def _reason(failure: BaseException) -> str:
    if isinstance(failure, torch.cuda.OutOfMemoryError):
        return "there is not enough memory to record one; a smaller --batch-size, more --engine.micro-batches or --engine.recompute need less"
    return f"it cannot be recorded: {(str(failure).splitlines() or [type(failure).__name__])[0]}"
