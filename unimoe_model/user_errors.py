"""Errors that commands report by their message, without a traceback."""

USER_ERRORS = (ValueError, RuntimeError, OSError, ModuleNotFoundError)
