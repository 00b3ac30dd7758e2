"""Makes Lightning's own callbacks work on a partitioned module."""
