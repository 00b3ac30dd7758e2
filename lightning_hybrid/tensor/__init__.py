"""The `tp` axis: infers which weights can be divided along which dim, proves it on numbers, and applies it."""
