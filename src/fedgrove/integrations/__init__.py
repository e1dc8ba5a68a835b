"""Other people's training scripts as clients of a federation."""
