"""Lightning's own callbacks on a partitioned module."""
