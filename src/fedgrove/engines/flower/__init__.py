"""The same job across processes and organisations, on Flower. The only room that imports flwr."""
