"""The commands of the command line: each a thin layer over one public call, with the same words."""
