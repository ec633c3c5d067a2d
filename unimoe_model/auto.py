"""Registration of Uni-MoE with the Auto classes of transformers."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    AutoProcessor,
)

from unimoe_model.configuration import UniMoEConfig
from unimoe_model.modeling import UniMoEForConditionalGeneration, UniMoEModel
from unimoe_model.processing import UniMoEProcessor


def register_auto_classes() -> None:
    """Registers Uni-MoE with `AutoConfig`, `AutoModel...` and `AutoProcessor`.

    Repeated calls have no further effect.

    Example:
        >>> register_auto_classes()
        >>> model = AutoModelForMultimodalLM.from_pretrained("runs/mine/model")
        >>> processor = AutoProcessor.from_pretrained("runs/mine/model")
    """
    AutoConfig.register(UniMoEConfig.model_type, UniMoEConfig, exist_ok=True)
    AutoModel.register(UniMoEConfig, UniMoEModel, exist_ok=True)
    for auto_model in (AutoModelForCausalLM, AutoModelForMultimodalLM):
        auto_model.register(UniMoEConfig, UniMoEForConditionalGeneration, exist_ok=True)
    AutoProcessor.register(UniMoEConfig, UniMoEProcessor, exist_ok=True)
