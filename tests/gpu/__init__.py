"""What needs an accelerator; the helpers take a device, so that they run on the CPU too."""
