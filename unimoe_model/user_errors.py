"""Errors whose message says all that a user needs, so that no traceback is shown."""

USER_ERRORS = (ValueError, RuntimeError, OSError, ModuleNotFoundError)
