"""The views of a run: progress, tables, plots, TensorBoard, MLflow.

The way in is `progress.Reporter`. A run counts as finished once its report is written here.
"""
