"""A site that really trains, and writes down each checkpoint that it makes; run by the nursery."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from commonweight.identity.folder import IdentityFolder
from commonweight.site.agent import Agent
from commonweight.site.audit import SiteAudit
from commonweight.site.policy import PolicyFile
from commonweight.site.records import SiteRecords
from commonweight.site.settings import load_settings
from commonweight.site.workshop import RecipeWorkshop
from commonweight.train.checkpoint import FileCheckpoint, WorkState


def run(folder: Path, *, keep_after_s: float) -> None:
    """Attend until killed; a line of `checkpoints` in the folder is a checkpoint: round and steps done."""
    save = FileCheckpoint.save

    def noted(self: FileCheckpoint, state: WorkState) -> None:
        with (folder / "checkpoints").open("a") as file:
            file.write(f"{self.task['round']} {state.sums.steps}\n")
        save(self, state)

    FileCheckpoint.save = noted  # type: ignore[method-assign]
    settings, records = load_settings(folder), SiteRecords(folder / "state.sqlite")
    parts: dict[str, Any] = {
        "identity": IdentityFolder.open(folder / "identity"),
        "workshop": RecipeWorkshop(settings, folder, checkpoint_s=0.0),
        "policy_file": PolicyFile(folder / "policy.yaml"),
        "records": records,
        "audit": SiteAudit(folder / "audit.jsonl", records),
    }
    asyncio.run(Agent(settings, **parts, keep_after_s=keep_after_s).run())
