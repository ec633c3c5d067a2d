"""The record of a conversion, stored beside the weights so that it can be undone."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from unimoe_model.checkpoints.writing import write_json

FILE = "conversion.json"


@dataclass
class Conversion:
    """Record of a conversion.

    Attributes:
        hears: kind of sound of the published checkpoint's aligner, `"speech"` or `"audio"`.
        eight: whether experts have the names of the eight-expert code.
        published_config: contents of the published `config.json`.
        aside: names of tensors that are not parameters of the model, with the reason; they are
            stored in a separate file.
        initialised: names of connector parameters that the source lacked.
        merged: names of matrices that LoRA was merged into.
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
        """Reads the record of a folder; returns None if there is none.

        Raises:
            ValueError: If the record is damaged.
        """
        path = folder / FILE
        if not path.is_file():
            return None
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except (json.JSONDecodeError, TypeError) as error:
            raise ValueError(f"file {path} must be the record of a conversion") from error

    def summary(self) -> str:
        """The record as a few lines of text."""
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
