class UserError(ValueError):
    """A mistake that the user can mend. The commands print it as one line, without a traceback, and exit with 2."""
