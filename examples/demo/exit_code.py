"""How a program of the demo ends: errors of the user are one line, a stop says how to go on."""

import sys
from collections.abc import Callable

from unimoe_model.user_errors import USER_ERRORS


def exit_code_of(name: str, work: Callable[[], object]) -> int:
    """Does the work of a program and returns its exit code.

    Args:
        name: of the program, in front of an error.
        work: what it does.
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
