"""The command line: the only code of the project that prints."""
