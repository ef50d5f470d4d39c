"""What people write: a study, and YAML into checked values.

The way in is `Study.read`. Nothing here opens an image or a weight.
"""
