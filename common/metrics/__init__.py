"""Counts that add over sites, the metrics they give, and how sure these are.

The ways in are `counts.Counts` and `metrics.METRICS`. Nothing here
needs a score of one image to leave a site.
"""
