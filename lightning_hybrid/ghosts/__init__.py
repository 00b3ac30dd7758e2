"""Parameters without storage: the dry run of a step, its trace, and modules built before their weights exist."""
