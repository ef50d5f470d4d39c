"""What has left this site, and the only way out: reserve, seal, send.

The way in is `release.release`. No line is ever changed or deleted.
"""
