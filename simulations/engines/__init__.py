"""Engines, in which virtual hospitals compute: this process, resident workers, or Ray.

The way in is `base`. Every engine runs the real apps on the real messages.
"""
