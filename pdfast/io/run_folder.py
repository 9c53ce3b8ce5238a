"""The folder of a run, and what lies where in it."""

import os
import re
from pathlib import Path

from pdfast.io.errors import UsageError
from pdfast.io.files import check_folder
from pdfast.io.process import is_rank0


class RunFolder:
    """runs/NAME/{config.yaml, log.jsonl, tb/, checkpoints/, teacher/, students/NNNN/, report.html, grid.png}"""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lock, self.config, self.log = path / ".lock", path / "config.yaml", path / "log.jsonl"
        self.tensorboard, self.checkpoints = path / "tb", path / "checkpoints"
        self.teacher, self._students = path / "teacher", path / "students"
        self.report, self.grid = path / "report.html", path / "grid.png"

    def student(self, steps: int) -> Path:
        """Return the folder of the student of so many steps."""
        return self._students / f"{steps:04d}"

    def students(self) -> dict[int, Path]:
        """Return the students' folders by their steps, from many to few; what has another name there is somebody's own."""
        named = (f for f in self._students.glob("*") if re.fullmatch("[0-9]{4,9}", f.name) and f.is_dir())
        found = {int(folder.name): folder for folder in named}
        return {n: found[n] for n in sorted(found, reverse=True) if n and found[n] == self.student(n)}

    def is_begun(self) -> bool:
        """Tell whether a run was begun here."""
        return os.path.exists(self.config)  # False also where the name is too long, which is said of the folder

    def check(self) -> None:
        """Raise a UsageError, in rank 0 and before any work, where the folder cannot be made or written to, or something else has
        the name of one of its files or folders: a pipe would be waited for."""
        if not is_rank0():
            return
        check_folder(self.path)
        for file in (self.lock, self.config, self.log, self.report, self.grid):
            if file.exists() and not file.is_file():
                raise UsageError(f"{file} is no regular file: move it away")
        for folder in (self.teacher, self._students, self.checkpoints):
            if (folder.is_symlink() or folder.exists()) and not folder.is_dir():
                raise UsageError(f"{folder} is no folder: move it away")
