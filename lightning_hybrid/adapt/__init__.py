"""Pure decisions: measurements in, a proposal out."""
