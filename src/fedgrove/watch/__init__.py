"""The live page of a run: what its directory says so far, drawn anew while it grows. Nothing here
writes into a run.
"""
