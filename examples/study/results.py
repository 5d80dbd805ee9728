"""The results file, which a study that was stopped goes on with behind the last line."""

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .plan import Job, Settings

Line = dict[str, Any]


class Results:
    """A JSON-lines file: settings first, then a line per finished run, and one for each time that the study went on."""

    def __init__(self, path: Path, settings: Settings) -> None:
        self.path = path
        wanted = json.loads(json.dumps(asdict(settings)))
        self.lines = read(path) if path.exists() else []
        if self.lines:
            found = self.lines[0].get("settings")
            if found != wanted:
                raise ValueError(f"{path}: expected results of {wanted}, got those of {found}; give another --out")
            os.truncate(path, path.read_bytes().rfind(b"\n") + 1)  # without a line that was cut short
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("")
            self.append({"what": "settings", "settings": wanted})
        self.done = {key(line): line for line in self.lines if is_run(line)}

    def append(self, line: Line) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.lines.append(line)

    def add(self, job: Job, found: Line) -> None:
        line = job.as_dict() | found
        self.append(line)
        self.done[job.key] = line
        assert key(line) == job.key, "a result has the name of one of the job's fields"


def read(path: Path) -> list[Line]:
    """The lines of a results file; a last one that was cut short does not count.

    Raises:
        ValueError: another line is no JSON object.
    """
    text = path.read_text()
    lines = text[: text.rfind("\n") + 1].splitlines()
    found = []
    for number, line in enumerate(lines, start=1):
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: expected a JSON object, got {line[:80]!r}") from error
    return found


def is_run(line: Line) -> bool:
    return line["what"] not in ("settings", "session")


def key(line: Line) -> str:
    return Job(**{name: line[name] for name in Job.__dataclass_fields__ if name in line}).key
