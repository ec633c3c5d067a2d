"""Where the weights of the paper's encoders are looked for."""

import os
from pathlib import Path

FOLDER_VARIABLE = "UNIMOE_ENCODERS"


def weights_source(name: str, repository: str) -> str:
    """A folder or file of `UNIMOE_ENCODERS`, or else the repository of the Hugging Face hub.

    Args:
        name: of the folder or file below the one that the environment variable names.
        repository: what transformers downloads, or finds in its cache, where there is none.
    """
    folder = os.environ.get(FOLDER_VARIABLE)
    if folder and (Path(folder) / name).exists():
        return str(Path(folder) / name)
    return repository
