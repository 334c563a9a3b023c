"""Rules that withstand sites which send what they like: each replaces the mean of a round's updates.

A round's updates are the rows of a matrix, n × d, which is read twice and never held: once for the rows' inner products
(`rows.py`), from which their lengths, their distances and whatever is a combination of them follow; and once more, a
stretch of columns at a time, to combine them. `strategy.py` does both, bounds the rows' norms and mixes them if asked
to; every other file is one rule.
"""
