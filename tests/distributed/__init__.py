"""Tests on gloo ranks of this machine."""
