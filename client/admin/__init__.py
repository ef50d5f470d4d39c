"""What a hospital does before it connects: set a site up, check it, see what a study would cost.

The ways in are `setup`, `doctor` and `cost`. Nothing here answers a server.
"""
