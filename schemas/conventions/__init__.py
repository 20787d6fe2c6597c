"""The naming conventions that families share."""
