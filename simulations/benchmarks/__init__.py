"""Measurements: the time that the frozen prefix saves, and that engines and privacy cost.

The way in is `consilium-simulate bench`. No figure here stands without a baseline of the same run.
"""
