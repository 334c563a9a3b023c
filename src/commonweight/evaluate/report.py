"""The report: one HTML file that needs nothing else, for people who were not there.

No script, no font, no image comes from anywhere; a content security policy in the page forbids it. Names of sites and
sample texts are not trusted: the template escapes everything but the drawings, which `svg` escapes.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from commonweight.errors import StateError, StorageError

from .leaks import leaks
from .summary import dig
from .text import shortened
from .view import build_view

FORMAT = 1
#: what a leak audit has found, beside the metrics
AUDIT = "audit.json"
KINDS: dict[str, type] = {"arms": dict, "gains": dict, "sites": dict, "rounds": list, "samples": list}
TEMPLATES = Path(__file__).parent / "templates"


def build_report(metrics: Mapping[str, Any], recipe_yaml: str, audit: Mapping[str, Any] | None = None) -> str:
    """The report as HTML.

    Args:
        metrics: a run's `metrics.json`; any arm, and any part beyond `name`, may be missing.
        recipe_yaml: the resolved recipe, shown as it is.
        audit: what a leak audit has found, if there was one.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["shortened"] = shortened
    style_css = (TEMPLATES / "style.css").read_text("utf-8")
    view = {**build_view(metrics, recipe_yaml), "leaks": leaks(audit or {})}
    return environment.get_template("report.html").render(style_css=style_css, **view)


def write_report(run_dir: Path) -> Path:
    """Write `run_dir/report.html` from `metrics.json`, `recipe.yaml` and, if there is one of this very adapter,
    `audit.json` beside it, in one step.

    Returns:
        The report's path.

    Raises:
        StateError: a file is missing or damaged, or its format is another version's.
        StorageError: the report cannot be written.
    """
    metrics = read_metrics(run_dir)
    recipe_yaml = _read(run_dir / "recipe.yaml")
    path = run_dir / "report.html"
    _replace(path, build_report(metrics, recipe_yaml, read_audit(run_dir, metrics)).encode("utf-8", "replace"))
    return path


def read_metrics(run_dir: Path) -> dict[str, Any]:
    """A run's `metrics.json`.

    Raises:
        StateError: it is missing, is not JSON, or its format is another version's.
    """
    path = run_dir / "metrics.json"
    try:
        metrics = json.loads(_read(path))
    except ValueError as error:
        raise StateError(f"{path} is not valid JSON: {error}", hint="run it again, or restore the file") from error
    if not isinstance(metrics, dict) or metrics.get("format") != FORMAT:
        found = metrics.get("format") if isinstance(metrics, dict) else None
        raise StateError(
            f"{path} has format {found!r}; this version reads {FORMAT}",
            hint="use the commonweight version that wrote it (`version` in the file)",
        )
    for key, kind in KINDS.items():
        if not isinstance(metrics.get(key, kind()), kind):
            raise StateError(f"{path}: `{key}` must be a {kind.__name__}", hint="run it again, or restore the file")
    return metrics


def read_audit(run_dir: Path, metrics: Mapping[str, Any]) -> dict[str, Any] | None:
    """What a leak audit of this run has found; None if there was none, or if it was of another adapter.

    Raises:
        StateError: the file is damaged.
    """
    path = run_dir / AUDIT
    if not path.exists():
        return None
    try:
        audit = json.loads(_read(path))
        current = audit["adapter_digest"] == dig(metrics, "adapter", "digest") and audit["format"] == FORMAT
    except (ValueError, KeyError, TypeError) as error:
        raise StateError(f"{path} is damaged: {error}", hint="delete it, or run the audit again") from error
    return audit if current else None


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except FileNotFoundError as error:
        raise StateError(f"{path} does not exist", hint="give the folder of a finished run") from error
    except (OSError, UnicodeDecodeError) as error:
        raise StateError(f"{path} cannot be read: {error}", hint="restore the file, or run it again") from error


def _replace(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise StorageError(f"{path} cannot be written: {error}", hint="check permissions and free space") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
