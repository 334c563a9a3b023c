"""Rules that withstand sites which send what they like: each replaces the mean of a round's updates.

`rows.py` holds what they share: sums, distances and sorted columns of a matrix whose rows are updates, taken a stretch
of columns at a time. `strategy.py` bounds the rows' norms, mixes them if asked to, and hands them to a rule; every
other file is one rule.
"""
