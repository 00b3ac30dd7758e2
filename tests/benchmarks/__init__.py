"""How much slower a step is than what one would write by hand, and how much memory a rank takes."""
