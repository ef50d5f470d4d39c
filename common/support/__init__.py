"""Files, keys, seeds, names, terminals and plot style, of which every role has need.

Each file is a way in. Nothing here knows a study, a site or a message.
"""
