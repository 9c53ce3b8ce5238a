"""torch.cuda without a GPU: fake tensors, and what the host would wait for."""

# ruff: noqa: E402

import contextlib
import ctypes
import sys
import traceback
from pathlib import Path

ctypes.CDLL(sys.argv[1], mode=ctypes.RTLD_GLOBAL)  # before torch is imported

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ROOT = Path(__file__).parents[2]
# What a host learns of a device's values, for which it waits.
VALUES = {"_local_scalar_dense", "nonzero", "is_nonzero", "equal", "_unique2", "unique_dim", "masked_select"}


class Properties:
    name, major, minor, multi_processor_count, total_memory = "fake", 9, 0, 132, 80 << 30
    warp_size, regs_per_multiprocessor, max_threads_per_multi_processor, max_threads_per_block = 32, 65536, 2048, 1024
    shared_memory_per_multiprocessor, shared_memory_per_block_optin, shared_memory_per_block = 233472, 232448, 49152
    L2_cache_size, gcnArchName = 50 << 20, ""


def _pinned(tensor: Tensor, *_: object) -> Tensor:
    copy = tensor.clone()
    copy.is_page_locked = True
    return copy


def pretend() -> None:
    """Let torch.cuda answer as with one GPU of sm_90."""
    stream = type("Stream", (), {"device_index": 0, "cuda_stream": 0, "stream_id": 0, "device_type": 1})()
    answers = {
        "is_available": True,
        "is_initialized": True,
        "_is_compiled": True,
        "device_count": 1,
        "current_device": 0,
        "get_device_capability": (9, 0),
        "get_device_properties": Properties(),
        "mem_get_info": (80 << 30, 80 << 30),
        "is_current_stream_capturing": False,
        "current_stream": stream,
        "set_device": None,
        "_lazy_init": None,
        "_exchange_device": 0,
        "_maybe_exchange_device": 0,
        "stream": contextlib.nullcontext(),
        "get_rng_state": torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": None,
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *_, answer=answer, **__: answer)
    torch._C._cuda_getDevice = lambda: 0
    torch._C._cuda_getCurrentRawStream = lambda _: 0
    torch.version.cuda = "13.0"
    torch.Tensor.pin_memory = _pinned
    empty = torch.empty

    def empty_of_any_memory(*size: object, pin_memory: bool = False, **options: object) -> Tensor:
        tensor = empty(*size, **options)
        if pin_memory:
            tensor.is_page_locked = True
        return tensor

    torch.empty = empty_of_any_memory


def to_fake(module: nn.Module) -> nn.Module:
    """Within a FakeTensorMode: parameters and buffers of the same shapes and dtypes on cuda."""
    for part in module.modules():
        for name, p in list(part._parameters.items()):
            if p is not None:
                fake = torch.empty(p.shape, dtype=p.dtype, device="cuda")
                part._parameters[name] = nn.Parameter(fake, requires_grad=p.requires_grad)
        for name, b in list(part._buffers.items()):
            if b is not None:
                part._buffers[name] = torch.empty(b.shape, dtype=b.dtype, device="cuda")
    return module


class Waits(TorchDispatchMode):
    """Lists what would make the host wait for the device: values read from it, and copies from or to memory that is not
    page-locked, each as `operation at file:line`."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    @classmethod
    def is_infra_mode(cls) -> bool:
        return True

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        name = function._schema.name.removeprefix("aten::")
        if name in VALUES and any(isinstance(t, Tensor) and t.device.type == "cuda" for t in tree_leaves(arguments)):
            self._note(name)
        result = function(*arguments, **options or {})
        tensors = [t for t in tree_leaves((arguments, options, result)) if isinstance(t, Tensor)]
        # A number is an argument of its kernel.
        on_host = [
            t for t in tensors if t.device.type == "cpu" and not (t.dim() == 0 and name not in ("copy_", "_to_copy"))
        ]
        crossing = len({t.device.type for t in tensors}) > 1 and any(not hasattr(t, "is_page_locked") for t in on_host)
        if crossing:
            self._note(name)
        return result

    def _note(self, name: str) -> None:
        ours = str(ROOT / "pdfast"), str(ROOT / "kernels")
        frames = [frame for frame in traceback.extract_stack() if frame.filename.startswith(ours)]
        where = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "?"
        self.found.append(f"{name} at {where}")
