"""Runs of a study that tests make up."""

from unimoe_model.study.record import Record, RoutingRecord


def made(arm="a", seed=0, losses=(1.0,) * 30, accuracy=None, taken=None, **others):
    """A run; `taken` are the routed rows of one layer by modality."""
    routing = None
    if taken is not None:
        experts = [f"e{i}" for i in range(len(next(iter(taken.values()))))]
        routing = RoutingRecord([0], experts, 1, {kind: [rows] for kind, rows in taken.items()})
    facts = {
        "hash": "h",
        "settings": "s",
        "stage": "tune",
        "items": dict.fromkeys(accuracy or {}, 10),
        "seconds": {"tune": 60.0},
        "precision": "fp32",
        "machine": "a machine",
        "version": "0",
        "commit": "",
    }
    facts |= others
    return Record(
        arm=arm,
        seed=seed,
        losses=list(losses),
        accuracy=dict(accuracy or {}),
        routing=routing,
        **facts,
    )
