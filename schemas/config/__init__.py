"""What the ``config.json`` of each family says, and the parts whose keys depend on each other."""
