"""A policy that lets a plain job through, and that job's facts: what the tests of a site's policy change."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from commonweight.site.policy import JobFacts, Policy

MODEL = "a" * 64
KEY = "b" * 64

OPEN: dict[str, Any] = {
    "models": [MODEL],
    "signers": ["lena"],
    "kinds": ["train", "evaluate"],
    "purposes": ["triage"],
    "strategies": ["built-in"],
    "objectives": ["built-in"],
    "relays": ["upland"],
    "min_cohort": 3,
    "max_rounds": 10,
    "max_bytes_per_round": 2_000,
    "max_bytes_total": 10_000,
    "privacy": {
        "dp_required": False,
        "max_epsilon": None,
        "budget": None,
        "secure_aggregation_required": False,
        "own_noise_required": False,
    },
    "remote_code": False,
    "approval": "none",
    "share": {"scores": "rows", "samples": True},
}

PLAIN = JobFacts(
    run="r1",
    name="demo",
    kind="train",
    signer="lena",
    signer_key=KEY,
    signer_role="lead",
    model=MODEL,
    purpose="triage",
    rounds=10,
    min_cohort=3,
    strategy="fedavg",
    objective="sft",
    update_bytes=1_000,
    evaluation=True,
    samples=1,
    dp="none",
    epsilon=None,
    secure_aggregation=False,
    trust_remote_code=False,
    num_sites=5,
)


def make_policy(**fields: Any) -> Policy:
    """`OPEN` with some fields changed; those of a section as `privacy__dp_required=True`."""
    values = {**OPEN, "privacy": {**OPEN["privacy"]}, "share": {**OPEN["share"]}}
    for name, value in fields.items():
        section, _, key = name.partition("__")
        if key:
            values[section][key] = value
        else:
            values[name] = value
    return Policy.model_validate(values)


def make_facts(**fields: Any) -> JobFacts:
    """`PLAIN` with some facts changed."""
    return replace(PLAIN, **fields)
