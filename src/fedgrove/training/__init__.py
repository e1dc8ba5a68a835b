"""Terms on a frozen base: the one training kernel, and what a client does with it."""
