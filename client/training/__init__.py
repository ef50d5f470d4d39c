"""Training and evaluation in plain PyTorch.

The way in is `trainer.train`. Nothing here protects a patient: that is `client.privacy`.
"""
