"""Values, gradients, determinism, CUDA graphs and torch.compile of every operation on a GPU."""

import pytest
import torch

from tests.gpu.operations import OPERATIONS

pytestmark = [pytest.mark.gpu, pytest.mark.parametrize("name", OPERATIONS)]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
# Of the largest value, where PyTorch's own error is nothing: a few roundings of each dtype.
FLOOR = {torch.bfloat16: 2**-7, torch.float16: 2**-10, torch.float32: 1e-6}


def leaves(tensors, dtype):
    return [t.detach().to(dtype).requires_grad_() for t in tensors]


def results(function, tensors, gradient):
    """The result, and the gradients of all tensors that have one."""
    y = function(*tensors)
    return [y, *torch.autograd.grad(y, tensors, gradient.to(y.dtype), allow_unused=True)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_within_twice_the_error_of_pytorch(draw, name, dtype):
    operation = OPERATIONS[name]
    rounded = leaves(operation.tensors(draw), dtype)
    if dtype == torch.float32 and not operation.in_float32:
        with pytest.raises(ValueError, match="head_dim"):
            operation.ours(*rounded)
        return
    gradient = draw(*operation.ours(*rounded).shape)
    ours, plain = (results(function, rounded, gradient) for function in (operation.ours, operation.plain))
    exact = results(operation.plain, leaves(rounded, torch.float64), gradient)
    for one, other, reference in zip(ours, plain, exact, strict=True):
        assert (one is None) == (reference is None)
        if one is not None:
            error, allowed = ((t.double() - reference).abs().max() for t in (one, other))
            assert error <= 2 * allowed + FLOOR[dtype] * reference.abs().max(), f"{error:.2e}, PyTorch {allowed:.2e}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_same_bits_in_every_run(draw, name, dtype):
    operation = OPERATIONS[name]
    if dtype == torch.float32 and not operation.in_float32:
        pytest.skip("its kernels do not take float32 at this head_dim")
    tensors = leaves(operation.tensors(draw), dtype)
    gradient = draw(*operation.ours(*tensors).shape)
    first = results(operation.ours, tensors, gradient)
    for _ in range(3):
        for one, other in zip(first, results(operation.ours, tensors, gradient), strict=True):
            assert one is None or torch.equal(one, other)


def test_in_a_cuda_graph(draw, name):
    operation = OPERATIONS[name]
    tensors = leaves(operation.tensors(draw), torch.bfloat16)
    gradient = draw(*operation.ours(*tensors).shape)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        results(operation.ours, tensors, gradient)  # compiles
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = results(operation.ours, tensors, gradient)
    with torch.no_grad():
        for tensor in tensors:
            tensor.mul_(0.5)
    graph.replay()
    for one, other in zip(captured, results(operation.ours, tensors, gradient), strict=True):
        assert one is None or torch.equal(one, other)


def test_compiled_without_a_graph_break(draw, name):
    operation = OPERATIONS[name]
    tensors = leaves(operation.tensors(draw), torch.bfloat16)
    gradient = draw(*operation.ours(*tensors).shape)
    torch._dynamo.reset()
    compiled = results(torch.compile(operation.ours, fullgraph=True), tensors, gradient)
    for one, other in zip(compiled, results(operation.ours, tensors, gradient), strict=True):
        assert one is None or torch.equal(one, other)
