"""Tests of the room `engine` on gloo ranks."""
