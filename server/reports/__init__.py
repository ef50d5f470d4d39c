"""What a run shows: progress, tables, plots, TensorBoard.

Nothing here changes a run.
"""
