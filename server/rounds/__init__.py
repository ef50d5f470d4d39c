"""A study's rounds: who joins, what is asked, how replies are checked and averaged.

The way in is `loop.Run`. Nothing here prints or draws.
"""
