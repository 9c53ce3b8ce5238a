"""A network of EDM's authors as a folder that `--teacher` takes.

python edm_weights.py NETWORK.pkl FOLDER

Run it with a checkout of github.com/NVlabs/edm in PYTHONPATH: the file is a pickle, which needs their code and runs what
is in it, so take it from where you trust it. torch and safetensors are needed besides.
"""

import json
import pickle
import sys
from pathlib import Path

import torch
from safetensors.torch import save


def write(file: str, folder: str) -> None:
    with open(file, "rb") as stream:
        network = pickle.load(stream)["ema"].cpu()
    out = Path(folder)
    out.mkdir(parents=True)
    config = {"format": "edm-1", "class_name": type(network).__name__, "init_kwargs": network.init_kwargs}
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    weights = {name: weight.contiguous().to(torch.float32) for name, weight in network.state_dict().items()}
    (out / "model.safetensors").write_bytes(save(weights))


if __name__ == "__main__":
    write(*sys.argv[1:])
