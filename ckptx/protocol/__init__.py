"""What travels between loaders and savers, and what both have to be."""
