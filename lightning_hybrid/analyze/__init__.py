"""Looks at a LightningModule: blocks, data flow, tensor plan, costs. Reads, never changes."""
