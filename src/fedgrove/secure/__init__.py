"""Secure aggregation: pure functions and typed messages, no network. ``member.py`` is a client's side of
a round, ``gathering.py`` the server's; ``messages.py`` is all that passes between them.
"""
