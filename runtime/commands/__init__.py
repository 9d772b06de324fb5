"""The commands of `rtx` that need no torch, one a file."""
