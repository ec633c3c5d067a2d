"""Exit of the demo's programs: one-line messages for user errors and interruptions."""

import sys
from collections.abc import Callable

from unimoe_model.user_errors import USER_ERRORS


def exit_code_of(name: str, work: Callable[[], object]) -> int:
    """Runs the work of a program and returns its exit code.

    Args:
        name: name of the program, the prefix of error messages.
        work: function to run.
    """
    try:
        work()
    except USER_ERRORS as error:
        print(f"{name}: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nStopped; the same command continues from here.", file=sys.stderr)
        return 130
    return 0
