"""What one update of a distillation keeps and sends, counted: run by torchrun, prints one JSON line a case.

Arguments: cases as SHARD,DTYPE,MICRO_BATCHES,TEACHER_SHARD.
"""

import json
import sys
from dataclasses import replace

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode

from pdfast.config import DistillConfig
from pdfast.data import load_source
from pdfast.engine.loop import Trainer
from pdfast.engine.machine import Machine, open_machine
from pdfast.engine.parallelize import local
from pdfast.methods import Progressive
from pdfast.recipes import preset


class Sent(TorchDispatchMode):
    """Bytes that a ring sends from each process, by collective."""

    def __init__(self):
        super().__init__()
        self.bytes = {"all-gather": 0.0, "reduce-scatter": 0.0, "all-reduce": 0.0}
        self.collectives = 0

    def __torch_dispatch__(self, operation, types, arguments=(), options=None):
        self.collectives += operation._schema.name.startswith("c10d::")
        match operation._schema.name:
            case "c10d::_allgather_base_":
                self.bytes["all-gather"] += arguments[1].nbytes * (_size(arguments[2]) - 1)
            case "c10d::_reduce_scatter_base_":
                self.bytes["reduce-scatter"] += arguments[0].nbytes * (_size(arguments[2]) - 1)
            case "c10d::allreduce_":
                size = _size(arguments[1])
                self.bytes["all-reduce"] += sum(t.nbytes for t in arguments[0]) * 2 * (size - 1) / size
        return operation(*arguments, **(options or {}))


def _size(group):
    return dist.ProcessGroup.unbox(group).size()


def case(machine: Machine, config: DistillConfig) -> dict:
    method, source = Progressive.open(config, machine), load_source("digits", image_size=8, channels=1, device="cpu")
    trainer = Trainer(method, method.optimization(config), config, machine, source, None)
    for update in range(2):
        trainer.batch.load(1, update)
        trainer.optimizer.set(update, 1e-3)
        with Sent() as sent:
            trainer.run_update()
    state = trainer.optimizer.state()
    teacher = [local(p) for p in method.teacher.parameters()]
    return {
        "state": sum(t.nbytes for t in state.values()),
        "teacher": sum(t.nbytes for t in teacher),
        **sent.bytes,
        "collectives": sent.collectives,
    }


def main(cases: list[str]) -> None:
    config = replace(preset("digits"), rounds=1, start_steps=4, end_steps=2, batch_size=16, device="cpu", ema=0.9)
    config = replace(config, train=replace(config.train, batch_size=16))
    with open_machine(config) as machine:
        world = machine.world
        for text in cases:
            shard, dtype, micro_batches, teacher = text.split(",")
            shard = int(shard)
            mesh = init_device_mesh("cpu", (world.size // shard, shard), mesh_dim_names=("replicate", "shard"))
            engine = replace(config.engine, shard=shard, micro_batches=int(micro_batches), teacher_shard=teacher)
            this = replace(machine, world=replace(world, mesh=mesh), settings=engine, dtype=getattr(torch, dtype))
            counted = case(this, replace(config, engine=engine))
            if world.is_rank0:
                print(json.dumps({"case": text} | counted), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
