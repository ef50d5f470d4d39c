"""Commands about a model that several roles have, each under its own name.

The way in is `models`. Nothing here knows a study that runs, or a site.
"""
