"""The house's own pictures, one module each: of single methods, which name them, and of what any run
may leave; see ``fedgrove.report.sections``.
"""
