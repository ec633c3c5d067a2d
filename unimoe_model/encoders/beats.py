"""BEATs: the sound encoder of the paper.

A transformer over 16 x 16 patches of a log-mel spectrogram, with gated relative positions and deep
norm: S. Chen et al., "BEATs: Audio Pre-Training with Acoustic Tokenizers", arXiv 2212.09058;
WavLM, arXiv 2110.13900 (positions); DeepNet, arXiv 2203.00555 (norm).
"""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from numpy.typing import NDArray
from torch import Tensor, nn

from unimoe_model.encoders.base import FrozenEncoder, check_waveforms
from unimoe_model.encoders.fbank import FRAME, MEL_BANDS, SAMPLE_RATE, beats_fbank, num_frames
from unimoe_model.encoders.published import FOLDER_VARIABLE, weights_source

FILE = "BEATs_iter3_plus_AS2M.pt"
CHUNK_SAMPLES = 30 * SAMPLE_RATE


@dataclasses.dataclass(frozen=True)
class BeatsConfig:
    """Sizes of a BEATs encoder, under their names in checkpoints.

    The defaults are those of BEATs_iter3_plus_AS2M. Only its architecture is supported: GELU,
    post-norm, deep norm, gated relative positions.
    """

    input_patch_size: int = 16
    embed_dim: int = 512
    conv_bias: bool = False
    encoder_layers: int = 12
    encoder_embed_dim: int = 768
    encoder_ffn_embed_dim: int = 3072
    encoder_attention_heads: int = 12
    conv_pos: int = 128
    conv_pos_groups: int = 16
    num_buckets: int = 320
    max_distance: int = 800

    @classmethod
    def from_checkpoint(cls, cfg: Mapping[str, object]) -> "BeatsConfig":
        """Reads the `cfg` of a checkpoint.

        Raises:
            ValueError: If a size is missing, or an option is not supported.
        """
        needed = {
            "activation_fn": "gelu",
            "layer_norm_first": False,
            "deep_norm": True,
            "relative_position_embedding": True,
            "gru_rel_pos": True,
        }
        for name, value in needed.items():
            if cfg.get(name) != value:
                raise ValueError(f"cfg[{name!r}] ({cfg.get(name)!r}) must be {value!r}")
        names = [field.name for field in dataclasses.fields(cls)]
        missing = [name for name in names if name not in cfg]
        if missing:
            raise ValueError(f"cfg has no {missing}")
        return cls(**{name: cfg[name] for name in names})


class BeatsAttention(nn.Module):
    """Self-attention with a relative position bias that is gated by each query."""

    def __init__(self, config: BeatsConfig) -> None:
        super().__init__()
        width, self.num_heads = config.encoder_embed_dim, config.encoder_attention_heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)
        self.grep_linear = nn.Linear(width // self.num_heads, 8)
        self.grep_a = nn.Parameter(torch.ones(1, self.num_heads, 1, 1))

    def forward(self, x: Tensor, position_bias: Tensor, key_mask: Tensor | None) -> Tensor:
        """Maps `[B, n, C]` to `[B, n, C]`.

        Args:
            x: `[B, n, C]`.
            position_bias: `[H, n, n]`, shared by all layers.
            key_mask: `[B, 1, 1, n]`, 0 or -inf to add; None adds nothing.
        """
        q, k, v = (
            rearrange(proj(x), "b n (h d) -> b h n d", h=self.num_heads)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        gates = self.grep_linear(q).unflatten(-1, (2, 4)).sum(-1).sigmoid()
        gate_a, gate_b = gates.chunk(2, dim=-1)
        bias = (gate_a * (gate_b * self.grep_a - 1) + 2) * position_bias
        if key_mask is not None:
            bias = bias + key_mask
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return self.out_proj(rearrange(y, "b h n d -> b n (h d)"))


class BeatsLayer(nn.Module):
    """Attention and a feed-forward block, each followed by its norm (deep norm)."""

    def __init__(self, config: BeatsConfig) -> None:
        super().__init__()
        width = config.encoder_embed_dim
        self.residual_scale = (2 * config.encoder_layers) ** 0.25
        self.self_attn = BeatsAttention(config)
        self.self_attn_layer_norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, config.encoder_ffn_embed_dim)
        self.fc2 = nn.Linear(config.encoder_ffn_embed_dim, width)
        self.final_layer_norm = nn.LayerNorm(width)

    def forward(self, x: Tensor, position_bias: Tensor, key_mask: Tensor | None) -> Tensor:
        """Maps `[B, n, C]` to `[B, n, C]`; see `BeatsAttention`."""
        attended = self.self_attn(x, position_bias, key_mask)
        x = self.self_attn_layer_norm(x * self.residual_scale + attended)
        fed = self.fc2(F.gelu(self.fc1(x)))
        return self.final_layer_norm(x * self.residual_scale + fed)


class BeatsEncoder(FrozenEncoder):
    """The frozen BEATs encoder over clips of sound at 16 kHz.

    Built with random weights; :meth:`from_checkpoint` reads the published ones.
    """

    sample_rate = SAMPLE_RATE

    def __init__(self, config: BeatsConfig | None = None) -> None:
        config = config or BeatsConfig()
        super().__init__("BEATs", feature_size=config.encoder_embed_dim)
        self.config = config
        width, patch = config.encoder_embed_dim, config.input_patch_size
        self.patch_embedding = nn.Conv2d(1, config.embed_dim, patch, patch, bias=config.conv_bias)
        self.layer_norm = nn.LayerNorm(config.embed_dim)
        self.post_extract_proj = nn.Linear(config.embed_dim, width)
        self.pos_conv = nn.Conv1d(
            width,
            width,
            config.conv_pos,
            padding=config.conv_pos // 2,
            groups=config.conv_pos_groups,
        )
        self.relative_attention_bias = nn.Embedding(
            config.num_buckets, config.encoder_attention_heads
        )
        self.encoder_layer_norm = nn.LayerNorm(width)
        self.layers = nn.ModuleList(BeatsLayer(config) for _ in range(config.encoder_layers))
        self.freeze()

    @classmethod
    def pretrained(cls) -> "BeatsEncoder":
        """Loads Microsoft's weights, which the paper uses, from the folder `UNIMOE_ENCODERS`.

        Raises:
            FileNotFoundError: If the folder has no such file. The weights are not on the hub.
        """
        path = Path(weights_source(FILE, ""))
        if not path.is_file():
            raise FileNotFoundError(
                f"{FILE} must be in the folder that {FOLDER_VARIABLE} names; it is published at "
                "github.com/microsoft/unilm, folder beats"
            )
        return cls.from_checkpoint(path)

    @classmethod
    def from_checkpoint(cls, path: str | Path) -> "BeatsEncoder":
        """Reads a published `.pt` file: `{"cfg": ..., "model": ...}`.

        Raises:
            FileNotFoundError: If the file does not exist.
            ValueError: If it is damaged, holds objects other than tensors and plain values, is of
                another architecture, or a tensor is missing, unexpected or of a wrong shape.
        """
        try:
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
            config = BeatsConfig.from_checkpoint(checkpoint["cfg"])
            encoder = cls(config)
            encoder.load_state_dict(own_names(checkpoint["model"]))
        except FileNotFoundError:
            raise
        except (RuntimeError, EOFError, KeyError, TypeError, ValueError, UnpicklingError) as error:
            raise ValueError(f"path ({path}): expected a checkpoint of BEATs: {error}") from error
        return encoder

    def forward(self, waveforms: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """Encodes clips of one length.

        Args:
            waveforms: `[B, samples]` floating point at 16 kHz, full scale 1.
            padding_mask: `[B, samples]` bool, True on padding; None for no padding.

        Returns:
            `[B, num_tokens(samples), C]` in the dtype of the weights.

        Raises:
            ValueError: If an argument has a wrong shape or dtype, or clips are shorter than one
                token.
        """
        check_waveforms(waveforms)
        if self.num_tokens(waveforms.shape[1]) == 0:
            raise ValueError(
                f"samples ({waveforms.shape[1]}) must be enough for one patch of "
                f"{self.config.input_patch_size} frames of 10 ms"
            )
        if padding_mask is not None and padding_mask.shape != waveforms.shape:
            raise ValueError(
                f"padding_mask (shape {list(padding_mask.shape)}) must have the shape of waveforms "
                f"{list(waveforms.shape)}"
            )
        weight = self.patch_embedding.weight
        with torch.no_grad():
            fbank = beats_fbank(waveforms.to(weight.device)).to(weight.dtype)
            return self.encode_fbank(fbank, padding_mask)

    def encode_recording(self, samples: NDArray[np.float32]) -> list[Tensor]:
        """Encodes a recording of any length in pieces of 30 s.

        Args:
            samples: `[samples]` float32 at 16 kHz, full scale 1.

        Returns:
            Features `[1496, C]` of each piece.
        """
        pieces = zip(*clip_chunks(torch.from_numpy(samples)), strict=True)
        return [self(piece[None], mask[None])[0] for piece, mask in pieces]

    def num_tokens(self, samples: int) -> int:
        """Number of tokens of a clip: frames and bands divided by the patch size, rounded down."""
        patch = self.config.input_patch_size
        return num_frames(samples) // patch * (MEL_BANDS // patch) if samples >= FRAME else 0

    def encode_fbank(self, fbank: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """Encodes log-mel frames.

        Args:
            fbank: `[B, frames, 128]`, from `beats_fbank`.
            padding_mask: `[B, samples]` bool, or None. The mask is divided into equal parts, one
                per frame and then one per token; a frame or token is padding if its whole part is.
                As in the published code, the frames of a patch are divided among its bands, so
                that some bands may be padding and others not.

        Returns:
            `[B, tokens, C]`, time-major: the bands of one time step are adjacent.
        """
        patches = self.patch_embedding(fbank.unsqueeze(1))
        x = self.layer_norm(rearrange(patches, "b c t f -> b (t f) c"))
        x = self.post_extract_proj(x)
        key_mask = None
        if padding_mask is not None:
            mask = coarsened(coarsened(padding_mask.to(x.device), fbank.shape[1]), x.shape[1])
            x = x.masked_fill(mask.unsqueeze(-1), 0)
            key_mask = x.new_zeros(mask.shape).masked_fill(mask, -torch.inf)[:, None, None]
        # An even kernel with this padding outputs one extra position.
        positions = self.pos_conv(x.transpose(1, 2))[..., : x.shape[1]].transpose(1, 2)
        x = self.encoder_layer_norm(x + F.gelu(positions))
        position_bias = self._position_bias(x.shape[1])
        for layer in self.layers:
            x = layer(x, position_bias, key_mask)
        return x

    def _position_bias(self, tokens: int) -> Tensor:
        """Position bias `[H, n, n]` of queries (rows) and keys (columns) by their distance."""
        position = torch.arange(tokens, device=self.relative_attention_bias.weight.device)
        distance = position[None, :] - position[:, None]
        buckets = relative_buckets(distance, self.config.num_buckets, self.config.max_distance)
        return self.relative_attention_bias(buckets).permute(2, 0, 1)


def coarsened(mask: Tensor, units: int) -> Tensor:
    """Reduces a mask `[B, n]` to `[B, units]`: True if all of a unit's equal part is True.

    The remainder of `n / units` is ignored.
    """
    share = mask.shape[1] // units
    return mask[:, : share * units].unflatten(1, (units, share)).all(-1)


def relative_buckets(distance: Tensor, num_buckets: int, max_distance: int) -> Tensor:
    """Bucket of each distance key - query, with half of the buckets for each direction.

    The first half of each direction's buckets is exact, the others grow logarithmically up to
    `max_distance` (T5, arXiv 1910.10683).
    """
    each = num_buckets // 2
    exact = each // 2
    size = distance.abs()
    grown = (size.clamp(min=1).float() / exact).log() / math.log(max_distance / exact)
    far = (exact + (grown * (each - exact)).long()).clamp(max=each - 1)
    return torch.where(size < exact, size, far) + each * (distance > 0)


def own_names(published: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Converts a published state dict to that of `BeatsEncoder`.

    Published checkpoints repeat the relative position bias in every layer, and store the weight of
    the positional convolution as a direction and, for each tap of the kernel, a norm.

    Raises:
        ValueError: If the biases of layers differ.
        KeyError: If the convolution is missing.
    """
    state = {}
    for name, tensor in published.items():
        key = name.removeprefix("encoder.")
        if key.endswith("self_attn.relative_attention_bias.weight"):
            key = "relative_attention_bias.weight"
            if key in state and not torch.equal(state[key], tensor):
                raise ValueError(f"{name} differs from that of another layer")
        elif name.startswith("encoder.layer_norm."):
            key = f"encoder_{key}"
        elif key.startswith("pos_conv.0."):
            key = key.replace("pos_conv.0.", "pos_conv.")
        state[key] = tensor
    direction, length = state.pop("pos_conv.weight_v"), state.pop("pos_conv.weight_g")
    norm = direction.norm(dim=(0, 1), keepdim=True)
    state["pos_conv.weight"] = direction * (length / norm)
    return state


def clip_chunks(waveform: Tensor) -> tuple[Tensor, Tensor]:
    """Splits a clip of any length into pieces of 30 s and pads the last one.

    Args:
        waveform: `[samples]` at 16 kHz, at least one.

    Returns:
        The pieces `[n, 480000]`, padded with the clip's last sample as in the published code, and
        a bool mask of the same shape, True on padding.

    Raises:
        ValueError: If the clip is empty or has a wrong shape.
    """
    if waveform.ndim != 1 or len(waveform) == 0:
        raise ValueError(
            f"waveform (shape {list(waveform.shape)}) must be of shape [samples], at least one"
        )
    missing = -len(waveform) % CHUNK_SAMPLES
    filled = torch.cat([waveform, waveform[-1:].expand(missing)])
    mask = torch.arange(len(filled), device=waveform.device) >= len(waveform)
    return filled.view(-1, CHUNK_SAMPLES), mask.view(-1, CHUNK_SAMPLES)
