"""An objective that goes wrong as told: at one site, a number of times, otherwise plain supervised fine-tuning.

Named in a recipe as `tests.unit.wayward:Wayward`. Processes die in the middle of this, so that how often it went wrong
is counted in files.
"""

from __future__ import annotations

import os
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict

from commonweight.model.tensors import NamedTensors
from commonweight.train.batches import Batch
from commonweight.train.local import LocalResult, LocalWork, Participant
from commonweight.train.loss import LanguageModel
from commonweight.train.sft import SupervisedFineTuning

ALWAYS = 1_000_000


class Wayward(SupervisedFineTuning):
    name = "wayward"

    class Options(BaseModel):
        """Which way, and where.

        `rows`: the site with so many training rows; None: every site. `folder`: counts how often it went wrong.
        """

        model_config = ConfigDict(extra="forbid", frozen=True)

        way: Literal[
            "killed", "raises", "nan loss", "nan report", "nan values", "infinite values", "slow", "exits", "none"
        ]
        folder: str
        rows: int | None = None
        times: int = ALWAYS

    options: Options

    def work(self, participant: Participant, task: LocalWork) -> LocalResult:
        wrong = self.options.rows in (None, len(task.tokens)) and self._once_more()
        self._way = self.options.way if wrong else "none"
        self._values = participant.trainables.values
        result = super().work(participant, task)
        if self._way in ("nan values", "infinite values"):
            spoil(self._values, float("nan" if self._way == "nan values" else "inf"))
        if self._way == "nan report":
            return replace(result, loss=float("nan"))
        return replace(result, num_examples=np.int64(result.num_examples), loss=np.float32(result.loss))

    def _once_more(self) -> bool:
        folder = Path(self.options.folder)
        for k in range(self.options.times):
            try:
                (folder / f"{self.options.way} {k}").touch(exist_ok=False)
            except FileExistsError:
                continue
            return True
        return False

    def backward(self, language_model: LanguageModel, batch: Batch, scale: float) -> float:
        """By now the values are the site's own, so that dying here is dying in the middle."""
        nats = super().backward(language_model, batch, scale)
        match self._way:
            case "killed":
                spoil(self._values, 1e9)
                os.kill(os.getpid(), signal.SIGKILL)
            case "exits":
                os._exit(7)
            case "raises":
                raise ValueError("row 3 is no row")
            case "nan loss":
                return float("nan")
            case "slow":
                time.sleep(3600)
        return nats


def spoil(values: NamedTensors, value: float) -> None:
    """Write a value into the last element."""
    for _, flat in values.floating():
        flat.data[-1] = value
