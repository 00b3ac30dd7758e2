"""The processes of a run: how they start, meet, stay in touch, and end."""
