"""Differential privacy and secure aggregation, between a client's report and the wire. See
docs/privacy.md.
"""
