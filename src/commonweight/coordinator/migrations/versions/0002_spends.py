"""The ledger of what rounds cost sites, with what was spent before there was one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    spends = op.create_table(
        "spends",
        sa.Column("run", sa.Text(), nullable=False),
        sa.Column("round", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("site", sa.Text(), nullable=False),
        sa.Column("unit", sa.Text(), nullable=False),
        sa.Column("adjacency", sa.Text(), nullable=False),
        sa.Column("mechanism", sa.Text(), nullable=False),
        sa.Column("noise_multiplier", sa.Double(), nullable=False),
        sa.Column("sampling", sa.Double(), nullable=False),
        sa.Column("count", sa.Integer(), nullable=False),
        sa.Column("t", sa.Double(), nullable=False),
        sa.ForeignKeyConstraint(["run"], ["runs.id"]),
        sa.PrimaryKeyConstraint("run", "round", "site"),
    )
    op.create_index("spends_of_site", "spends", ["site"], unique=False)
    commits = op.get_bind().execute(
        sa.text(
            "SELECT c.run, c.round, c.record, r.submitted_at AS t FROM commits c JOIN runs r ON r.id = c.run "
            "WHERE c.round > 0"
        )
    )
    rows = [row for commit in commits.mappings() for row in _spends(commit)]
    if rows:
        op.bulk_insert(spends, rows)


def _spends(commit: sa.RowMapping) -> Iterator[dict[str, Any]]:
    record = json.loads(commit["record"])
    private = record.get("privacy")
    kind = {
        "unit": "site" if private else "none",
        "adjacency": "one site whose updates are in the sums or left out of them" if private else "any two data sets",
        "mechanism": "gaussian" if private else "none",
        "noise_multiplier": private["noise_multiplier"] if private else 0.0,
    }
    where = {"run": commit["run"], "round": commit["round"], "sampling": 1.0, "count": 1, "t": commit["t"]}
    for site in record.get("answered", ()):
        yield {**where, **kind, "site": site}
