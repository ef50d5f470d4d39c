"""Heads solved from sums over sites, in closed form: equal to pooled training, whatever the split.

The way in is `registry`: one entry for each head. Nothing here knows of images, sites or messages.
"""
