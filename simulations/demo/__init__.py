"""A deployment as processes of this machine, told step by step.

The way in is `deployment`. Nothing here listens beyond loopback.
"""
