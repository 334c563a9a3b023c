"""The command line called in this process: its exit code and what it printed."""

from __future__ import annotations

import io
import json
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from tempfile import TemporaryFile
from typing import IO, Any
from unittest.mock import patch

from commonweight.cli.main import main


@dataclass(frozen=True)
class Answer:
    """What a command left: its exit code, standard output and standard error."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """Standard output as one JSON object; fails if there is anything else on it."""
        return json.loads(self.out, parse_constant=_refused)


def _refused(name: str) -> None:
    raise AssertionError(f"{name} is not JSON")


def call(*arguments: object, stdin: str = "") -> Answer:
    """`commonweight ARGUMENTS`, with files, not a terminal, at its ends: workers write into them too."""
    code, argv = 0, ["commonweight", *map(str, arguments)]
    with (
        TemporaryFile("w+", encoding="utf-8") as out,
        TemporaryFile("w+", encoding="utf-8") as err,
        patch.object(sys, "argv", argv),
        patch.object(sys, "stdin", io.StringIO(stdin)),
    ):
        with redirect_stdout(out), redirect_stderr(err):
            try:
                main()
            except SystemExit as end:
                code = end.code if isinstance(end.code, int) else int(end.code is not None)
        return Answer(code, _all(out), _all(err))


def _all(file: IO[str]) -> str:
    file.flush()
    file.seek(0)
    return file.read()
