"""The command line: `kvloom --help` lists the commands."""
