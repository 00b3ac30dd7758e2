"""Tests of the room `reshard` on gloo ranks."""
