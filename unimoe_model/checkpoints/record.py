"""What a conversion did, kept beside the weights so that it can be undone."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from unimoe_model.checkpoints.writing import write_json

FILE = "conversion.json"


@dataclass
class Conversion:
    """What a conversion did.

    Attributes:
        hears: `"speech"` or `"audio"`: what the published checkpoint's aligner is for.
        eight: whether experts are called as in the eight-expert code.
        published_config: its `config.json`.
        aside: tensors that have no place in the model, and why; they lie in a file beside it.
        initialised: parameters of connectors that the source lacks.
        merged: matrices that a LoRA was merged into.
    """

    hears: str
    eight: bool
    published_config: dict
    aside: dict[str, str] = field(default_factory=dict)
    initialised: list[str] = field(default_factory=list)
    merged: list[str] = field(default_factory=list)

    def save(self, folder: Path) -> None:
        """Writes the record into a folder."""
        write_json(folder / FILE, asdict(self))

    @classmethod
    def load(cls, folder: Path) -> "Conversion | None":
        """Reads the record of a folder; None if it has none.

        Raises:
            ValueError: If it is damaged.
        """
        path = folder / FILE
        if not path.is_file():
            return None
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except (json.JSONDecodeError, TypeError) as error:
            raise ValueError(f"file {path} must be the record of a conversion") from error

    def summary(self) -> str:
        """A few lines for people."""
        lines = [f"kept aside: {len(self.aside)} tensors"]
        reasons = {}
        for reason in self.aside.values():
            reasons[reason] = reasons.get(reason, 0) + 1
        lines += [f"  {count} {reason}" for reason, count in reasons.items()]
        connectors = sorted({name.split(".")[1] for name in self.initialised})
        lines.append(f"LoRA merged into {len(self.merged)} matrices")
        if connectors:
            lines.append(f"not in the source, initialised: {', '.join(connectors)}")
        return "\n".join(lines)
