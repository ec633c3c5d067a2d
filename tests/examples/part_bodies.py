"""Bodies of processes that train nothing; importing this file takes no time."""

import os
import time


def fail_or_wait(name, recipe, seed, features, queue, threads):
    """The MoE fails immediately; the others would train for a while."""
    if name == "moe":
        queue.put((name, "failed", ("disk is full",), {}))
    else:
        time.sleep(30)
        recipe.with_name("trained").touch()


def die(*arguments):
    """Ends without a message, like a process killed by the kernel."""
    os._exit(9)


def leave(*arguments):
    """Ends normally and without a message, like a process that is interrupted."""


def tell(name, recipe, seed, features, queue, threads):
    """Reports its arguments, and shows progress."""
    asked = f"{name} of {recipe} {seed} {features} {threads}"
    queue.put((name, "say", (asked,), {}))
    queue.put((name, "start", ("tune", 2, 1), {}))
    queue.put((name, "advance", (1,), {"loss": "0.5"}))
    queue.put((name, "finish", (), {}))
    queue.put((name, "done", (), {}))
