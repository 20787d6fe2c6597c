"""Files read and planned: open files, gathered reads, the spool, what a file will hold."""
