"""The command line: `kvloom demo | list | show`."""
