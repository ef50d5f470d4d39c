"""What the hospital allows, what was agreed with a study, and who is left out.

The way in is `policy`. Nothing here can be widened by a server.
"""
