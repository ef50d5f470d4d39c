"""Metrics from counts that add up, and statistics over seeds.

The way in is `metrics.METRICS`. Nothing here needs a score of one image to leave a site.
"""
