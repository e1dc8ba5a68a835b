"""What becomes of a message's tensors between a method and the wire."""
