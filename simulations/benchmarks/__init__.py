"""What the frozen prefix saves, and what engines and privacy cost in time.

Each prints ratios against a baseline of the same run.
"""
