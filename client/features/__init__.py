"""Images into the trainable layers' input: decoded once, through the frozen prefix once, kept.

The way in is `extract.prepare_images`. Nothing here trains, and nothing leaves the site.
"""
