"""The parts of ``benchmarks/evidence.py``: fields, the oracle, cached runs, statistics, claims,
pictures.
"""
