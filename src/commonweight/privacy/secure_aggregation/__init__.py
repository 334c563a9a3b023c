"""Sums of updates of which nobody sees a single one (Bonawitz et al. 2017; graphs of Bell et al. 2020).

party.py      a site's side         shamir.py       secrets in shares        session.py   who takes part, thresholds
collector.py  the coordinator's     masks.py        pairwise and own masks   graph.py     whose masks cancel whose
messages.py   what goes between     fixed_point.py  real numbers in a ring
"""
