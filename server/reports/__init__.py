"""The views of a run: progress, tables, plots, TensorBoard.

Nothing here changes a run.
"""
