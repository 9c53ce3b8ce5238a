"""What each of several processes says of the images of `test_real.py`, twice, the second time of a kept file: one JSON line a
process."""

import json
import sys

from pdfast.cli import run_command
from pdfast.engine.world import open_world
from pdfast.evaluation.real import RealImages
from tests.evaluation.test_real import Pixels, everything, source


def main():
    with open_world("cpu") as world:
        lines = []
        for _ in range(2):
            space = Pixels()
            real_images = RealImages(source(), space, 41, world, batch_size=7)
            lines.append({"seen": space.seen, "said": everything(real_images)})
        sys.stdout.write(json.dumps(lines) + "\n")


run_command(main)
