"""Detection of misspelt fields of transformers' configurations, which accept any name."""

from collections.abc import Iterable

from transformers import PreTrainedConfig

# Read by transformers in other fields, or of every configuration.
_ALSO = ("model_type", "rope_theta", "rope_scaling", "dtype")


def refuse_unknown_fields(names: Iterable[str], config: type[PreTrainedConfig], where: str) -> None:
    """Raises ValueError for the first name that is not a field of a configuration.

    Args:
        names: names of fields.
        config: class of the configuration, which has defaults for all fields.
        where: the argument or key that holds the fields, for the message.
    """
    known = {*config().to_dict(), *config.attribute_map, *_ALSO}
    for name in names:
        if name not in known:
            raise ValueError(f"{where} has an unknown key {name!r}: no field of {config.__name__}")
