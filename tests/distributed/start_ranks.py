"""Ranks that do not fit each other, and what each of them is told: `MODE PORT` say how."""

import sys
from pathlib import Path

from launcher import write

from unimoe_kernels.distributed import finish_parallel, start_parallel


def main(folder, rank, world, mode, port):
    arguments = {"data": 1, "expert": world, "world_size": world, "fingerprint": "same"}
    if mode == "mesh" and rank == 1:
        arguments |= {"data": world, "expert": 1}
    if mode == "settings" and rank == 1:
        arguments["fingerprint"] = "other"
    if mode == "world" and rank == 1:
        arguments |= {"expert": world + 1, "world_size": world + 1}
    try:
        mesh = start_parallel(
            **arguments, rank=rank, init_method=f"tcp://127.0.0.1:{port}", timeout=4
        )
        text = f"{mesh.mesh_dim_names} {tuple(mesh.shape)}"
        finish_parallel()
    except (ValueError, RuntimeError) as error:
        text = f"{type(error).__name__}: {error}"
    (folder / f"text{rank}").write_text(text, encoding="utf-8")
    write(folder, rank, {})


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], int(sys.argv[5]))
