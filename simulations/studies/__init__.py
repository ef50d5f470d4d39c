"""Studies from the command line, one or many: baselines, sweeps, ε, attacks, intervals.

The way in is `runner`. Nothing here computes what an app computes.
"""
