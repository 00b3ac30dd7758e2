"""What is logged, and what it costs."""
