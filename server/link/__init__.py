"""All that hospitals can reach, and the grid that the rounds send through.

The way in is `serve`. Only enrolled sites get further than a challenge.
"""
