"""`unimoe` whose draws with the seed 13 fail at the second token."""

import sys

from unimoe_model.chat import sampling
from unimoe_model.cli import main

_draw = sampling._Draw.__call__
_count = 0


def _faulty(self, input_ids, scores):
    global _count
    if self.generator.initial_seed() == 13:
        _count += 1
        if _count % 2 == 0:
            raise RuntimeError("there is no draw")
    return _draw(self, input_ids, scores)


if __name__ == "__main__":  # the process that decodes imports this file as well
    sampling._Draw.__call__ = _faulty
    sys.exit(main())
