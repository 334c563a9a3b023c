"""How good a run's models are, how sure that is, and the report that says so."""

from .metrics import Scores, compare, macro, macro_interval, spread, summarise
from .report import build_report, write_report
from .summary import controls_table, gains, headline, plain_summary

__all__ = [
    "Scores",
    "build_report",
    "compare",
    "controls_table",
    "gains",
    "headline",
    "macro",
    "macro_interval",
    "plain_summary",
    "spread",
    "summarise",
    "write_report",
]
