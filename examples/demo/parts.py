"""The parts of a run that train in separate processes, and their messages to the main process."""

import json
import os
import threading
import time
from pathlib import Path

import torch
import torch.multiprocessing as mp
from transformers.utils.logging import disable_progress_bar

from examples.demo.progress import QueueReporter, replay
from examples.demo.settings import SHARED
from unimoe_kernels import atomic_write
from unimoe_model.encoders.outside import permit_encoder
from unimoe_model.folder_lock import FolderLock
from unimoe_model.training.freed_memory import keep_freed_memory
from unimoe_model.training.progress import BarReporter, ProgressReporter
from unimoe_model.training.recipe import Recipe, load_recipe
from unimoe_model.training.recipe_data import RecipeData
from unimoe_model.training.run import Run
from unimoe_model.user_errors import USER_ERRORS

EVALUATION, FEATURES = "evaluation.json", "features.json"


def open_run(
    recipe: Path,
    seed: int,
    features: Path,
    reporter: ProgressReporter,
    shared: Path | None = None,
) -> tuple[Recipe, Run]:
    """Reads the recipe of an arm and opens its run.

    Args:
        recipe: recipe of the arm.
        seed: seed of the run.
        features: folder of features.
        reporter: shows progress.
        shared: folder of the run, in which arms share the stages they have in common; None for a
            folder of its own, beside the recipe and with its name.
    """
    found = load_recipe(recipe, seed=seed)
    for name in found.encoder_names:
        permit_encoder(name, recipe.parent)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    output = shared or recipe.with_suffix("")
    run = Run(
        found,
        RecipeData(found),
        output,
        features,
        reporter,
        device,
        is_shared=shared is not None,
    )
    return found, run


def train_shared(recipe: Path, seed: int, features: Path, reporter: ProgressReporter) -> Run:
    """Encodes all media, trains the first stage if both arms share it, and returns the run."""
    with FolderLock(recipe.with_suffix("")):
        found, run = open_run(recipe, seed, features, reporter)
        started = time.monotonic()
        run.encode()
        _keep(recipe.with_suffix("") / FEATURES, {"seconds": time.monotonic() - started})
        if found.stages[0].name == SHARED:
            run.train([SHARED])
    return run


def train_arm(recipe: Path, seed: int, features: Path, reporter: ProgressReporter) -> None:
    """Trains one arm and evaluates it.

    Args:
        recipe: recipe of the arm.
        seed: seed of the run.
        features: folder of features.
        reporter: shows progress.
    """
    with FolderLock(recipe.with_suffix("")):
        found, run = open_run(recipe, seed, features, reporter)
        names = [stage.name for stage in found.stages]
        run.train(names)
        started = time.monotonic()
        run.evaluate(names[-1:])
        _keep(recipe.with_suffix("") / EVALUATION, {"seconds": time.monotonic() - started})
        run.publish(names[-1])


def run_parts(
    recipes: dict[str, Path], seed: int, features: Path, threads: int, target=None
) -> None:
    """Trains and evaluates arms of the demo side by side, each in its own process.

    Args:
        recipes: recipe of each arm.
        seed: seed of the run.
        features: folder of features.
        threads: number of torch threads per process.
        target: function that the processes run, like `_body`.

    Raises:
        RuntimeError: If one of them fails; its message is passed on.
    """
    context = mp.get_context("spawn")
    queue = context.Queue()
    processes = {
        name: context.Process(
            target=target or _body,
            args=(name, recipe, seed, features, queue, threads),
            daemon=True,
        )
        for name, recipe in recipes.items()
    }
    reporters = {
        name: BarReporter(prefix=f"{name:>5} ", position=i) for i, name in enumerate(recipes)
    }
    for process in processes.values():
        process.start()
    running = set(processes)
    try:
        while running:
            if queue.empty():
                ended = {name: processes[name].exitcode for name in running}
                ended = {name: code for name, code in ended.items() if code is not None}
                # All messages of a process are in the queue before it ends.
                if ended and queue.empty():
                    name, code = ended.popitem()
                    raise RuntimeError(f"training of {name} ended with exit code {code}")
                time.sleep(0.1)
                continue
            message = queue.get()
            if message[1] == "done":
                running.remove(message[0])
            elif message[1] == "failed":
                raise RuntimeError(f"training of {message[0]} failed: {message[2][0]}")
            else:
                replay(message, reporters)
    finally:
        for process in processes.values():
            if running:
                process.terminate()
            process.join()


def _body(name: str, recipe: Path, seed: int, features: Path, queue, threads: int) -> None:
    torch.set_num_threads(threads)
    keep_freed_memory()
    disable_progress_bar()
    _exit_with_parent()
    try:
        train_arm(recipe, seed, features, QueueReporter(name, queue))
    except KeyboardInterrupt:
        return
    except USER_ERRORS as error:
        queue.put((name, "failed", (str(error),), {}))
        return
    except Exception as error:
        queue.put((name, "failed", (f"{type(error).__name__}: {error}",), {}))
        raise
    queue.put((name, "done", (), {}))


def _exit_with_parent() -> None:
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _keep(path: Path, facts: dict[str, float]) -> None:
    """Records a time, unless there is one: a part that is already complete takes none."""
    if path.exists():
        return
    with atomic_write(path) as partial:
        partial.write_text(json.dumps(facts), encoding="utf-8")
