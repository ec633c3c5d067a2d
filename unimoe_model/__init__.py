"""Uni-MoE (arXiv 2405.11273): one language model for text, images, video, speech and audio.

Names in `__all__` are imported from their modules on first use, so importing the package loads
neither torch nor transformers. After `register_auto_classes()` the Auto classes of transformers
load Uni-MoE checkpoints.

Example:
    >>> from unimoe_model import UniMoEConfig
    >>> UniMoEConfig().num_experts_per_tok
    2
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from unimoe_model.auto import register_auto_classes
    from unimoe_model.chat import Conversation, Sampling
    from unimoe_model.checkpoints.assemble import assemble
    from unimoe_model.checkpoints.convert import convert_from_published, convert_to_published
    from unimoe_model.configuration import UniMoEConfig
    from unimoe_model.encoders import FrozenEncoder, build_encoder
    from unimoe_model.encoders.outside import choose_encoders
    from unimoe_model.evaluation.file_routing import route_file
    from unimoe_model.evaluation.scoring import evaluate_file
    from unimoe_model.generation import Answerer
    from unimoe_model.modeling import UniMoEForConditionalGeneration, UniMoEModel
    from unimoe_model.parallel_generation import generate_in_parallel, load_in_parallel
    from unimoe_model.processing import UniMoEProcessor
    from unimoe_model.training.command import train_recipe
    from unimoe_model.training.recipe import load_recipe

__all__ = [
    "Answerer",
    "Conversation",
    "FrozenEncoder",
    "Sampling",
    "UniMoEConfig",
    "UniMoEForConditionalGeneration",
    "UniMoEModel",
    "UniMoEProcessor",
    "assemble",
    "build_encoder",
    "choose_encoders",
    "convert_from_published",
    "convert_to_published",
    "evaluate_file",
    "generate_in_parallel",
    "load_in_parallel",
    "load_recipe",
    "register_auto_classes",
    "route_file",
    "train_recipe",
]

# The module of each public name; tests compare it with the imports above.
_MODULES = {
    "Answerer": "generation",
    "Conversation": "chat",
    "FrozenEncoder": "encoders",
    "Sampling": "chat",
    "UniMoEConfig": "configuration",
    "UniMoEForConditionalGeneration": "modeling",
    "UniMoEModel": "modeling",
    "UniMoEProcessor": "processing",
    "assemble": "checkpoints.assemble",
    "build_encoder": "encoders",
    "choose_encoders": "encoders.outside",
    "convert_from_published": "checkpoints.convert",
    "convert_to_published": "checkpoints.convert",
    "evaluate_file": "evaluation.scoring",
    "generate_in_parallel": "parallel_generation",
    "load_in_parallel": "parallel_generation",
    "load_recipe": "training.recipe",
    "register_auto_classes": "auto",
    "route_file": "evaluation.file_routing",
    "train_recipe": "training.command",
}


def __getattr__(name: str) -> Any:
    """Imports a public name from its module on first use."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
