"""What RLinf saves beside forms that others have too: its local shards."""
