"""The run folder, from which a stopped study goes on, and the results of a finished one.

The way in is `RunFolder`. No file in it is ever half written.
"""
