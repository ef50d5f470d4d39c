"""Differential privacy: ε for a plan, DP-SGD, the one noised release, the self-check.

The ways in are `plan`, before, and `dp_sgd.train`. No noise is drawn or accounted elsewhere.
"""
