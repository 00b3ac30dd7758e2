"""From a request to a partitioned module: decides the plan, and applies it in the one wrapping order."""
