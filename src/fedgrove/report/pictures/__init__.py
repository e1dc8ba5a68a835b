"""Sections of single systems, one module each, found by themselves; see
``fedgrove.report.sections``.
"""
