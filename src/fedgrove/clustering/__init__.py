"""Groups of clients from distances between them: merge tree and nested cuts, spectral clustering.

Distances are [N, N] arrays, symmetric with a zero diagonal, rows in client order; labels are int64
[N], numbered by first appearance in row order.
"""
