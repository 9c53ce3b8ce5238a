"""`use` and what else is said for a while: threads and asyncio tasks beside each other, and autograd's own threads."""

import asyncio
import contextlib
import threading

import pytest
import torch
from torch._dynamo.testing import CompileCounter

import pdfast_kernels
from pdfast_kernels import group_norm, use
from pdfast_kernels.runtime import dispatch
from pdfast_kernels.runtime.configs import ANY, UNBOUNDED, Blocks, Table, looked_up
from pdfast_kernels.runtime.launch import launch, recorded
from tests.kernels.compare import channels_last


def interleaved(first, second):
    """Enter one in a thread, the other in a second thread, leave the first, then the second. What each saw within."""
    barriers, seen = [threading.Barrier(2) for _ in range(3)], [None, None]

    def one(context):
        with context():
            barriers[0].wait()
            barriers[1].wait()
            seen[0] = now()
        barriers[2].wait()

    def other(context):
        barriers[0].wait()
        with context():
            barriers[1].wait()
            barriers[2].wait()
            seen[1] = now()

    threads = [threading.Thread(target=one, args=(first,)), threading.Thread(target=other, args=(second,))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return seen


def now():
    return dispatch._current_mode()


def test_two_threads_have_a_mode_each_and_leave_none():
    before = now()
    assert interleaved(lambda: use("triton"), lambda: use("reference")) == ["triton", "reference"]
    assert now() == before
    with use("reference"):
        assert interleaved(contextlib.nullcontext, lambda: use("triton")) == [before, "triton"]
        assert now() == "reference"


def test_tasks_have_a_mode_each(monkeypatch):
    seen = {}

    async def task(mode, turns):
        with use(mode):
            for _ in range(turns):
                await asyncio.sleep(0)
            seen[mode] = now()

    async def both():
        await asyncio.gather(task("triton", 1), task("reference", 3))

    before = now()
    asyncio.run(both())
    assert seen == {"triton": "triton", "reference": "reference"} and now() == before
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert now() == before


def test_an_error_ends_it_too():
    before = now()
    with pytest.raises(KeyError), use("reference"), use("triton"):
        raise KeyError
    assert now() == before


@pytest.mark.parametrize("mode", ["triton", "reference"])
def test_the_gradient_is_of_the_mode_of_its_forward(triton_kernels, draw, mode):
    """In a thread that knows of none, and outside of the `with`: as autograd's threads for a GPU."""
    x, weight, dy = channels_last(draw(2, 8, 3, 3)).requires_grad_(), draw(8).requires_grad_(), draw(2, 8, 3, 3)
    with use(mode):
        y = group_norm(x, 2, weight)
        expected = torch.autograd.grad(y, (x, weight), dy, retain_graph=True)
    launched = []

    def backward():
        with recorded(90) as launches:  # the kernels, and nothing is computed by them
            torch.autograd.grad(y, (x, weight), dy, retain_graph=True)
        launched.extend(launches)
        launched.append(torch.autograd.grad(y, (x, weight), dy))

    thread = threading.Thread(target=backward)
    thread.start()
    thread.join()
    *launches, gradients = launched
    assert bool(launches) == (mode == "triton")
    assert all(torch.equal(one, other) for one, other in zip(gradients, expected, strict=True))


def test_compiled_code_knows_the_mode_it_was_compiled_for(triton_kernels, draw):
    """One graph a mode, taken again where that mode is on again, also in another thread."""
    x, counter = channels_last(draw(1, 8, 2, 2)), CompileCounter()
    torch.compiler.reset()
    compiled = torch.compile(lambda x: group_norm(x, 2), fullgraph=True, backend=counter)

    def results(mode, out):
        with use(mode):
            out.append((compiled(x), group_norm(x, 2)))

    seen = []
    for mode in ("triton", "reference", "triton", "reference"):
        results(mode, seen)
    assert counter.frame_count == 2
    for mode in ("reference", "triton"):
        thread = threading.Thread(target=results, args=(mode, seen))
        thread.start()
        thread.join()
    assert counter.frame_count == 2 and len(seen) == 6
    assert all(torch.equal(ours, expected) for ours, expected in seen)


def test_rows_of_two_threads_leave_one_by_one():
    own, first, second = Blocks(UNBOUNDED, 16, 1), Blocks(UNBOUNDED, 32, 1), Blocks(UNBOUNDED, 64, 1)
    table = Table("example", {ANY: (own,)})
    interleaved(lambda: table.overridden(first), lambda: table.overridden(second))
    assert table.row(90, 1) == own
    with table.overridden(first), table.overridden(second):
        assert table.row(90, 1) == second
    interleaved(looked_up, looked_up)
    with looked_up() as asked:
        table.row(90, 1)
    assert [lookup.row for lookup in asked] == [own]


def test_launches_of_another_thread_are_not_recorded():
    ran = []

    class Kernel:
        def __getitem__(self, grid):
            return lambda **arguments: ran.append(arguments)

    with recorded(80) as launches:
        thread = threading.Thread(target=lambda: launch(Kernel(), (1,), num_warps=4, x=torch.zeros(1)))
        thread.start()
        thread.join()
    assert not launches and len(ran) == 1


def test_an_unknown_mode():
    with pytest.raises(ValueError, match="mode is 'fast': say one of auto, triton, reference"):
        with use("fast"):
            pass
    assert "use" in pdfast_kernels.__all__
