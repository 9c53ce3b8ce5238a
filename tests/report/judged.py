"""What each of several processes says of the images of `test_real.py`, twice, the second time of a kept file: one JSON line a
process."""

import json
import os
import sys

from pdfast.engine.world import open_world
from pdfast.report.real import RealImages
from tests.report.test_real import Pixels, everything, source

with open_world("cpu") as world:
    lines = []
    for _ in range(2):
        space = Pixels()
        real_images = RealImages(source(), space, 41, world, batch_size=7)
        lines.append({"seen": space.seen, "said": everything(real_images)})
    sys.stdout.write(json.dumps(lines) + "\n")
sys.stdout.flush()
# Gloo's threads sometimes abort a process that takes the interpreter down right after its group (torch 2.13).
os._exit(0)
