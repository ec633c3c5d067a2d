"""Makes the repository root importable, as where examples are run from.

Models and data of tests/model are shared.
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
for folder in (str(HERE.parents[1]), str(HERE), str(HERE.parent / "model")):
    if folder not in sys.path:
        sys.path.append(folder)
