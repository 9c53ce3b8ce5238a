"""When an update is recorded as a CUDA graph, and what is left where that fails: on a stand-in for torch.cuda."""

import contextlib
import warnings

import pytest
import torch

from pdfast.engine.graph import CUDAGraphed
from pdfast.engine.world import World


class StandIn:
    """What `CUDAGraphed` asks of torch.cuda. A recording that an error spoils ends with another one and stays on its stream, as
    PyTorch's does; one that runs out of memory is whole."""

    def __init__(self, monkeypatch):
        self.current, self.streams, self.modes, self.recording = "current", [], [], False
        self.emptied, self.forgotten, self.replays, self.unjoined = 0, [], 0, False
        self.drawing_recorded = False  # what the generators of random numbers take for true until a recording ends well
        for name in ("Stream", "CUDAGraph", "graph", "stream", "Event"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: self.Stream(self.current))
        monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: setattr(self, "current", stream.name))
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
        monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: None)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 7))
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: setattr(self, "emptied", self.emptied + 1))
        for name in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
            monkeypatch.setattr(
                torch._C, name, lambda device, pool, name=name: self.forgotten.append((name, pool)), raising=False
            )

    def Stream(self, name=None):
        if name is None:
            self.streams.append(name := f"side {len(self.streams)}")
        return type("Stream", (), {"name": name, "wait_stream": lambda self, other: None})()

    def Event(self):
        return type("Event", (), {"record": lambda self: None, "synchronize": lambda self: None})()

    def CUDAGraph(self):
        return type("Graph", (), {"replay": lambda graph: setattr(self, "replays", self.replays + 1)})()

    @contextlib.contextmanager
    def stream(self, stream):
        before, self.current = self.current, stream.name
        yield
        self.current = before

    @contextlib.contextmanager
    def graph(self, graph, pool=None, stream=None, capture_error_mode="global"):
        self.modes.append(capture_error_mode)
        before, self.current = self.current, stream.name if stream else "its own"
        self.recording = self.drawing_recorded = True
        try:
            yield
        except torch.cuda.OutOfMemoryError:
            self.current, self.drawing_recorded = before, False
            raise
        except BaseException:
            raise RuntimeError("operation failed due to a previous error during capture")  # noqa: B904
        finally:
            self.recording = False
        if self.unjoined:
            self.unjoined = False
            raise RuntimeError("capture was not joined")
        self.current, self.drawing_recorded = before, False


@pytest.fixture
def cuda(monkeypatch):
    return StandIn(monkeypatch)


def replayed(function):
    return CUDAGraphed(function, World(torch.device("cuda")))


def test_plain_calls_and_the_recording_share_one_stream(cuda):
    """Memory belongs to the stream that it was allocated on: other streams would not use it again."""
    seen = []
    run = replayed(lambda: seen.append((cuda.current, cuda.recording)))
    for _ in range(5):
        run()
    assert seen == [("side 0", False), ("side 0", False), ("side 0", True)]
    assert cuda.streams == ["side 0"] and cuda.replays == 3 and cuda.current == "current"
    assert cuda.modes == ["thread_local"]  # what other threads do is no error


@pytest.mark.parametrize(
    "error, reason, spoilt",
    [
        (
            RuntimeError("a copy from pageable memory\nmore"),
            "it cannot be recorded: a copy from pageable memory$",
            True,
        ),
        (ValueError(), "it cannot be recorded: ValueError$", True),
        (
            torch.cuda.OutOfMemoryError("CUDA out of memory. Tried"),
            "there is not enough memory to record one; a",
            False,
        ),
    ],
)
def test_a_recording_that_fails(cuda, error, reason, spoilt):
    """The update runs, plainly, where it ran before; the reason is that of the update; the memory is given back."""
    ran = []

    def update():
        if cuda.recording:
            raise error
        ran.append(cuda.current)

    run = replayed(update)
    for _ in range(2):
        run()
    with pytest.warns(UserWarning, match=f"updates run without a CUDA graph: {reason}"):
        run()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run()
    assert ran == ["side 0", "side 0", "current", "current"] and cuda.replays == 0
    assert cuda.emptied == 1 and not cuda.drawing_recorded
    ended = [("_cuda_endAllocateToPool", (0, 7)), ("_cuda_releasePool", (0, 7))]
    assert cuda.forgotten == (ended if spoilt else [])


def test_a_recording_of_which_only_the_end_fails(cuda):
    """Its memory is given back as well."""
    run, cuda.unjoined = replayed(lambda: None), True
    for _ in range(2):
        run()
    with pytest.warns(UserWarning, match="it cannot be recorded: capture was not joined$"):
        run()
    assert cuda.current == "current" and not cuda.drawing_recorded
    assert cuda.forgotten == [("_cuda_endAllocateToPool", (0, 7)), ("_cuda_releasePool", (0, 7))]


def test_an_update_that_fails_by_itself_says_why(cuda):
    def update():
        if len(cuda.modes):
            raise ValueError("of the update")

    run = replayed(update)
    for _ in range(2):
        run()
    with pytest.warns(UserWarning, match="of the update"), pytest.raises(ValueError, match="of the update"):
        run()


def test_to_be_stopped_while_recording_is_no_failure(cuda):
    def update():
        if cuda.recording:
            raise KeyboardInterrupt

    run = replayed(update)
    for _ in range(2):
        run()
    with pytest.raises(KeyboardInterrupt):
        run()
    assert cuda.current == "current"
