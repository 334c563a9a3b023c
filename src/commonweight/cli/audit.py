"""`commonweight audit`: what a run's model gives away. The logs of sites have an audit of their own."""

from __future__ import annotations

from ..errors import EXIT_REFUTED
from .folders import read_run
from .terminal import JsonOption, RunArgument, SetOption, begin, print_json, say, table


def audit(run: RunArgument, set_: SetOption = None, json: JsonOption = False) -> None:
    """Attack a run's model: what does it give away of the rows that it was trained on?

    Canaries (privacy.canaries in the recipe) bound ε from below: above the ε that the run claims, the audit fails with
    exit code 11. Membership inference tells rows trained on from held-out ones; the token-span test reads a text's
    tokens off an update. What was found is left in audit.json and in the report.

    The hash-chained logs of sites are another thing: `commonweight site audit`.
    """
    begin(json)
    read_run(run)
    from ..evaluate.leaks import CONVERSE, canary_facts, membership_rows, span_explained, span_rows, verdict
    from ..leaks.audit import audit_run

    found = audit_run(run, set_ or ())
    if json:
        print_json({"run": str(run), **found})
    else:
        facts = canary_facts(found)
        if facts:
            table(("canaries", ""), facts)
            say("")
        rows = [(row["name"], row["auc"], row["auc_interval"], *row["tpr"]) for row in membership_rows(found)]
        table(("membership", "AUC", "95 % interval", "TPR at 1 % FPR", "at 0.1 %"), rows, right=(1,))
        say("")
        if found["token_span"].get("why_not"):
            say(f"Token-span test: not done; {found['token_span']['why_not']}.")
        else:
            table(
                ("tokens read off an update", "found"), [(r["name"], r["share"]) for r in span_rows(found)], right=(1,)
            )
            say(span_explained(found))
        say("")
        say(verdict(found))
        say(CONVERSE)
    if found["verdict"] == "exceeded":
        raise SystemExit(EXIT_REFUTED)
