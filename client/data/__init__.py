"""A hospital's images and labels as records, in whatever format they are kept.

The way in is `registry`. Nothing here decodes an image before it is asked for one.
"""
