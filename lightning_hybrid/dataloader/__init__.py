"""Which samples each replica reads, in which order, with which random numbers."""
