"""Live progress from a run's events, and the tables at its end."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from .terminal import interval, is_terminal, number, say, table

_REDRAW_S = 0.1


class Progress:
    """Shows how a run goes on: one live line on a terminal, a line a round elsewhere. Draws only when an event comes.

    No thread of its own: workers are forked from this process, and a fork copies only the thread that forks.
    """

    def __init__(self, *, quiet: bool) -> None:
        self.quiet = quiet
        self.live: Any = None
        self.drawn_at = 0.0
        self.state: dict[str, Any] = {
            "phase": "loading",
            "round": 0,
            "rounds": 0,
            "answered": 0,
            "cohort": 0,
            "loss": None,
        }

    def __enter__(self) -> Self:
        if not self.quiet and is_terminal():
            from rich.live import Live

            self.live = Live(auto_refresh=False, transient=True)
            self.live.start()
            self._draw(force=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.live is not None:
            self.live.stop()

    def listen(self, event: str, fields: Mapping[str, Any]) -> None:
        """Take in one event."""
        if self.quiet:
            return
        line = self._update(event, fields)
        if line:
            self._print(line)
        if self.live is not None:
            self._draw(force=bool(line))

    def note(self, line: str) -> None:
        """A line that stays on the screen."""
        if not self.quiet:
            self._print(line)

    def _print(self, line: str) -> None:
        if self.live is not None:
            self.live.console.print(line, highlight=False, markup=False, emoji=False)
        else:
            print(line, flush=True)

    def _update(self, event: str, fields: Mapping[str, Any]) -> str | None:
        """Change the state by an event; the line that stays on the screen, if the event is worth one."""
        state = self.state
        match event:
            case "run_started":
                after = fields["resumed_after_round"]
                return f"run {fields['name']}" + (f", resumed after round {after}" if after else "")
            case "loaded":
                return f"{fields['num_sites']} sites, data and model loaded in {fields['seconds']:.1f} s"
            case "parts":
                from ..evaluate.text import parts_in_words

                return "\n".join(parts_in_words(fields["sites"]))
            case "engine_started":
                state |= {"rounds": fields["rounds"], "phase": "base model"}
                return (
                    f"{fields['workers']} workers on {fields['device']}, {fields['trainable']:,} trainable parameters"
                )
            case "round_opened":
                cohort = fields["cohort"]
                size = cohort if isinstance(cohort, int) else len(cohort)
                state |= {"phase": "round", "round": fields["round"], "answered": 0, "cohort": size}
            case "update_accepted":
                state["answered"] += 1
            case "evaluated":
                if fields["arm"] == "personal":
                    own = f"sites' own models: held-out loss {fields['macro_loss']:.3f}"
                    return f"round {fields['round']}: {own}" if fields["round"] else None
                state["loss"] = fields["macro_loss"]
                if fields["arm"] == "base":
                    return f"base model: held-out loss {fields['macro_loss']:.3f}"
                if fields["round"]:
                    return f"round {fields['round']}: held-out loss {fields['macro_loss']:.3f}"
            case "site_failed" | "update_refused":
                return f"round {fields['round']}: site {fields['site']} left out: {fields['reason']}"
            case "site_late":
                return f"round {fields['round']}: site {fields['site']} was too late"
            case "evaluation_missing":
                what = f"not evaluated at {', '.join(fields['sites'])}" if fields["sites"] else "no sample answer"
                return f"{what}: {fields['reason']}"
            case "worker_replaced":
                return "a worker died and was replaced; its task is repeated"
            case "adapter_saved":
                return "federated adapter saved"
            case "controls_started":
                state |= {"phase": "controls", "answered": 0, "cohort": fields["chains"], "detail": ""}
            case "control_progress":
                state["detail"] = f"{fields['arm']}: round {fields['round']}"
            case "control_finished":
                state["answered"] += 1
        return None

    def _draw(self, *, force: bool) -> None:
        now = time.monotonic()
        if not force and now - self.drawn_at < _REDRAW_S:
            return
        self.drawn_at = now
        self.live.update(self._bar(), refresh=True)

    def _bar(self) -> Any:
        from rich.progress_bar import ProgressBar
        from rich.table import Table

        state = self.state
        done, total = state["answered"], max(1, state["cohort"])
        if state["phase"] == "round":
            text = f"round {state['round']}/{state['rounds']}  {done}/{state['cohort']} sites"
            done, total = (state["round"] - 1) * total + done, state["rounds"] * total
        elif state["phase"] == "controls":
            text = f"control arms  {done}/{state['cohort']}  {state['detail']}"
        else:
            text = state["phase"]
        if state["loss"] is not None:
            text += f"  loss {state['loss']:.3f}"
        grid = Table.grid(padding=(0, 1))
        grid.add_row(ProgressBar(total=total, completed=done, width=30), text)
        return grid


class NetworkProgress(Progress):
    """The same for a run over a network, where sites come, go and refuse."""

    def _update(self, event: str, fields: Mapping[str, Any]) -> str | None:
        match event:
            case "run_started":
                self.state["phase"] = "waiting for sites"
            case "site_joined":
                return f"site {fields['site']} has joined"
            case "site_refused":
                return f"site {fields['site']} does not take part: {fields['reason']}"
            case "waiting_for_sites":
                return f"all {fields['asked']} sites asked have answered, {fields['joined']} have joined"
            case "loaded":
                return None
            case "engine_started":
                self.state |= {"rounds": fields["rounds"], "phase": "base model"}
                return f"sites taking part: {fields['workers']}; {fields['trainable']:,} trainable parameters"
            case "site_away":
                return f"round {fields['round']}: site {fields['site']} is away"
            case "site_back":
                return f"round {fields['round']}: site {fields['site']} is back"
            case "task_repeated":
                return f"round {fields['round']}: site {fields['site']} tries again: {fields['reason']}"
            case "round_repeated":
                return f"round {fields['round']} is tried again"
            case "run_interrupted":
                return f"interrupted: {fields['reason']}"
        return super()._update(event, fields)


def print_result(metrics: Mapping[str, Any], folder: Path) -> None:
    """The controls table, the summary, one sample answer before and after, and where things are."""
    from ..evaluate.summary import controls_table, plain_summary

    print()
    table(
        ("model", "loss", "95 % interval", "tokens right", "worst site"),
        [_arm(row) for row in controls_table(metrics)],
        right=(1, 3),
    )
    print()
    for sentence in plain_summary(metrics):
        say(sentence)
    for sample in (metrics.get("samples") or [])[:1]:
        _print_sample(sample)
    print(f"\nadapter  {folder / 'adapter'}\nreport   {folder / 'report.html'}", flush=True)


def _arm(row: Mapping[str, Any]) -> tuple[str, ...]:
    from ..evaluate.text import shortened

    worst = "–" if row["worst_site"] is None else f"{shortened(row['worst_site'], 20)} {number(row['worst_loss'])}"
    return row["label"], number(row["macro_loss"]), interval(row["ci95"]), number(row["token_accuracy"]), worst


def _print_sample(sample: Mapping[str, Any]) -> None:
    print()
    say(str(sample["prompt"]))
    for label, key in (("before", "before"), ("after", "after"), ("reference", "reference")):
        say(f"  {label:<10}{' '.join(str(sample[key]).split()) or '(nothing)'}")


def print_partition(partition: Mapping[str, Any]) -> None:
    """How the data falls to sites."""
    counts = ("train_examples", "train_tokens", "train_label_tokens", "heldout_examples", "truncated", "dropped")
    rows = [(name, *(f"{site[key]:,}" for key in counts)) for name, site in partition["sites"].items()]
    shown = rows if len(rows) <= 40 else [*rows[:20], ("…", *("",) * 6), *rows[-19:]]
    table(("site", "rows", "tokens", "label tokens", "held out", "cut", "dropped"), shown, right=range(1, 7))
    print(
        f"\nsize skew (Gini) {number(partition['size_gini'], 2)}; heterogeneity {number(partition['heterogeneity'])} "
        f"(the same rows shuffled: {number(partition['heterogeneity_iid'])})"
    )
