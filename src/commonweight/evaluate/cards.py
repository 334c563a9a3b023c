"""The report's key figures; a figure that was not measured has no card."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from .metrics import perplexity
from .summary import controls_table, dig, macro_loss, num_sites, share_of_pooling, starting_loss, tally
from .text import duration, finite, number, percent, shortened, size, span, surprise, whole

Metrics = Mapping[str, Any]


def cards(metrics: Metrics) -> list[dict[str, str]]:
    """Key figures: `label`, `value`, `note`."""
    makers: tuple[Callable[[Metrics], tuple[str, str, str] | None], ...] = (
        _loss_card,
        _worst_card,
        _perplexity_card,
        _verdict_card,
        _pooling_card,
        _bytes_card,
        _privacy_card,
        _size_card,
        _time_card,
    )
    made = [card for maker in makers if (card := maker(metrics))]
    return [{"label": label, "value": value, "note": note} for label, value, note in made]


def _loss_card(metrics: Metrics) -> tuple[str, str, str] | None:
    loss, ci95 = macro_loss(metrics, "federated"), dig(metrics, "arms", "federated", "ci95")
    if loss is None:
        return None
    return "Mean loss, together", number(loss), f"95\u202f% interval {span(ci95)}" if ci95 else "nats per token"


def _federated(metrics: Metrics) -> Mapping[str, Any] | None:
    return next((row for row in controls_table(metrics) if row["arm"] == "federated"), None)


def _worst_card(metrics: Metrics) -> tuple[str, str, str] | None:
    row = _federated(metrics)
    if row is None or row["worst_site"] is None or num_sites(metrics) < 2:
        return None
    name = shortened(row["worst_site"], 24)
    return "Worst site’s loss, together", number(row["worst_loss"]), f"{name}; spread {number(row['loss_std'])}"


def _perplexity_card(metrics: Metrics) -> tuple[str, str, str] | None:
    row = _federated(metrics)
    before = starting_loss(metrics)
    if row is None:
        return None
    return (
        "Perplexity",
        surprise(row["perplexity"]),
        f"from {surprise(perplexity(before))} before training" if before is not None else "lower is better",
    )


def _verdict_card(metrics: Metrics) -> tuple[str, str, str] | None:
    verdicts = tally(metrics)
    if not verdicts or num_sites(metrics) < 2:
        return None
    total = sum(verdicts.values())
    note = f"{verdicts['loses']:,} lose, {verdicts['unclear']:,} unclear"
    return "Sites that gain", f"{verdicts['gains']:,} of {total:,}", note


def _pooling_card(metrics: Metrics) -> tuple[str, str, str] | None:
    share = share_of_pooling(metrics)
    return None if share is None else ("Of the gain from pooling", percent(share), "without pooling any data")


def _bytes_card(metrics: Metrics) -> tuple[str, str, str] | None:
    sent = finite(dig(metrics, "bytes", "up"))
    return None if sent is None else ("Left the sites", size(sent), "adapter updates, no rows")


def _privacy_card(metrics: Metrics) -> tuple[str, str, str] | None:
    kind, epsilon = dig(metrics, "privacy", "dp") or "none", finite(dig(metrics, "privacy", "epsilon"))
    if kind == "none" or epsilon is None:
        return "Differential privacy", "off", "ε = ∞"
    return "Differential privacy", f"ε = {number(epsilon)}", str(kind)


def _size_card(metrics: Metrics) -> tuple[str, str, str] | None:
    whole_model, trained = (finite(dig(metrics, "model", key)) for key in ("parameters", "trainable"))
    if not whole_model or trained is None:
        return None
    share = trained / whole_model
    digits = 0 if share >= 0.0995 else 1 if share >= 0.00095 else 3
    return "Of the weights trained", percent(share, digits), f"{whole(trained)} of {whole(whole_model)}"


def _time_card(metrics: Metrics) -> tuple[str, str, str] | None:
    total = finite(dig(metrics, "seconds", "total"))
    device = str(dig(metrics, "machine", "device") or "")
    label = "Time, controls included" if dig(metrics, "seconds", "controls") else "Time"
    return None if total is None else (label, duration(total), f"on {device}" if device else "")
