"""The code that Inductor generates for a GPU that is not there. Import after `tests.fake_gpu.cuda`."""

import copy
from collections.abc import Callable

import torch
from torch import Tensor
from torch._dynamo.utils import detect_fake_mode
from torch._functorch._aot_autograd.utils import make_boxed_func
from torch._inductor import compile_fx
from torch._inductor import config as settings
from torch._inductor.debug import DebugContext
from torch._inductor.fx_passes import joint_graph
from torch._inductor.graph import GraphLowering
from torch._inductor.virtualized import V
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

sources: list[str] = []


class _Driver:
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device=None: 0)
    get_active_torch_device = staticmethod(lambda: torch.device("cuda", 0))
    get_device_interface = staticmethod(lambda: torch.cuda)
    is_active = staticmethod(lambda: True)


def _generate(graph_module: torch.fx.GraphModule, inputs: list, **options: object) -> Callable:
    """Keeps the code; what runs is the graph, op by op, on fake tensors."""
    lowered = copy.deepcopy(graph_module)
    inference, backward = bool(options.get("is_inference")), bool(options.get("is_backward"))
    with V.set_fake_mode(detect_fake_mode(inputs)), V.set_debug_handler(DebugContext()), torch.no_grad():
        compile_fx.view_to_reshape(lowered)
        compile_fx.fake_tensor_prop(lowered, inputs)
        compile_fx._recursive_record_original_output_strides(lowered)
        compile_fx._recursive_post_grad_passes(lowered, is_inference=inference)
        graph = GraphLowering(
            lowered,
            example_inputs=inputs,
            is_inference=inference,
            is_backward=backward,
            cpp_wrapper=False,
            aot_mode=False,
        )
        with V.set_graph_handler(graph):
            graph.run(*inputs)
            code, _ = graph.codegen()
    sources.append(code.value)
    return make_boxed_func(graph_module.forward)


def generated(function: Callable[..., Tensor], *arguments: Tensor) -> list[str]:
    """The source of a function's forward and backward, compiled for its fake cuda tensors."""
    driver.set_active(_Driver())
    joint_graph.lazy_init = lambda *_, **__: None  # its patterns are traced on the GPU
    sources.clear()

    def backend(graph_module: torch.fx.GraphModule, inputs: list) -> Callable:
        return compile_fx.compile_fx(graph_module, inputs, inner_compile=_generate)

    with settings.patch(joint_graph_constant_folding=False, fallback_random=True):
        torch.compile(function, backend=backend, fullgraph=True, dynamic=False)(*arguments).sum().backward()
    return list(sources)
