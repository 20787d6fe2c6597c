"""The only code that writes tensor bytes: writer, journal, atomic publication."""
