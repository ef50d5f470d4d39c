"""Measurements: the time that the frozen prefix saves, and that engines and privacy cost.

Each prints ratios against a baseline of the same run.
"""
