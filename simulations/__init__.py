"""Many virtual hospitals on one machine, with the same code as the real ones.

The way in is `studies.runner`, and `cli` for a person. Nothing here computes what an app computes.
"""
