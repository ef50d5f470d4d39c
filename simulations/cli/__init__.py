"""The command `consilium-simulate`.

The way in is `main.main`. Nothing is decided here that the rooms below do not know.
"""
