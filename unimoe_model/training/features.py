"""Features of a stage's media, computed once and cached on disk."""

import hashlib
import json
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from unimoe_model.data.content_key import DigestMemo, content_key
from unimoe_model.data.encoded_media import SENSES, EncodedMedia, encode_media, read_media
from unimoe_model.data.feature_store import FeatureStore, needed_bytes
from unimoe_model.data.indexed_files import Media
from unimoe_model.encoders import FrozenEncoder, build_encoder
from unimoe_model.encoders.outside import chosen_encoder, code_digest, is_outside
from unimoe_model.folder_lock import FolderInUseError
from unimoe_model.processing import UniMoEProcessor
from unimoe_model.training.progress import ProgressReporter
from unimoe_model.training.ranks import Ranks
from unimoe_model.training.stopping import StoppedError, StopRequest

BATCHES = {"image": 32, "video": 4, "speech": 64, "audio": 16}
"""Items per batch of an encoder, by media kind."""
_FLUSH_SECONDS = 10.0
KindAndFile = tuple[str, Media]


class MediaFeatures:
    """Features of media files by kind, from feature stores that are filled on demand.

    Args:
        processor: processor with the names of the encoders and their options.
        folder: folder of the stores.
        device: device of the encoders.
        precision: `"bf16"` runs the encoders of pictures and speech in bfloat16.
        reporter: shows progress.
        ranks: processes that train together, of which the first one encodes; None for a single
            process.
    """

    def __init__(
        self,
        processor: UniMoEProcessor,
        folder: Path,
        device: torch.device,
        precision: str,
        reporter: ProgressReporter,
        ranks: Ranks | None = None,
    ):
        self._processor = processor
        self._folder = folder
        self._device = device
        self._precision = precision
        self._reporter = reporter
        self._ranks = ranks or Ranks()
        self._memo = DigestMemo(folder)
        self._keys: dict[Media, str] = {}
        self._encoders: dict[str, FrozenEncoder] = {}
        self._described: dict[str, dict] = {}
        self._stores: dict[str, FeatureStore] = {}
        self._states: dict[str, FeatureStore] = {}

    def leave_ranks(self) -> None:
        """Makes this process encode for itself, after the others have ended."""
        self._ranks = Ranks()

    def prepare(self, media: Iterable[KindAndFile]) -> None:
        """Encodes media that are not cached; all processes must call it.

        Resets `use_query_states`, so that `item` returns encoder features.

        Args:
            media: kind and location of each media file.

        Raises:
            ValueError: If a file cannot be read; the message names it.
            StoppedError: If a signal stopped it; features encoded so far are kept.
        """
        self._states = {}
        for kind, paths in _by_kind(media).items():
            if kind not in self._stores:
                self._folder.mkdir(parents=True, exist_ok=True)
                self._stores[kind] = FeatureStore(self._folder, self._settings(kind))
            store = self._stores[kind]
            self._fill(store, f"encode {kind}", paths, BATCHES[kind], self._encode, kind)

    def use_query_states(
        self, kinds: Sequence[str], model: nn.Module, media: Iterable[KindAndFile]
    ):
        """Runs the frozen bodies of connectors over their media and caches the outputs.

        Args:
            kinds: media kinds whose connector bodies are frozen; only `"speech"` and `"audio"` have
                a body.
            model: model with the connectors; switched to eval mode, so that dropout is inactive.
            media: kind and location of each media file of the stage.
        """
        for kind, paths in _by_kind(media).items():
            connector = model.model.connector(kind)
            if kind not in kinds or not hasattr(connector, "hidden_states"):
                continue
            model.eval()
            body = _body_digest(connector)
            settings = self._settings(kind) | {"body": body}
            settings["encoder"] = f"{kind}-states-{settings['encoder']}"
            self._states[kind] = FeatureStore(self._folder, settings)
            self._fill(
                self._states[kind], f"connector {kind}", paths, 32, self._run_body, kind, connector
            )

    def identity(self, media: Iterable[KindAndFile]) -> str:
        """Hash of the contents of media and of what determines their features.

        Args:
            media: kind and location of each media file.

        Returns:
            16 hexadecimal digits.

        Raises:
            ValueError: If a file is missing.
        """
        digest = hashlib.sha256()
        for kind, paths in _by_kind(media).items():
            digest.update(json.dumps([kind, self._settings(kind)], sort_keys=True).encode())
            for path in paths:
                digest.update(self._key(path).encode())
        return digest.hexdigest()[:16]

    def item(self, kind: str, path: Media) -> EncodedMedia:
        """Returns the features of a file, or its query states if the stage uses them."""
        states = self._states.get(kind)
        store = self._stores[kind] if states is None else states
        return EncodedMedia(tuple(store.read(self._key(path))), states is not None)

    def _fill(self, store: FeatureStore, title: str, paths, size: int, encode, *options) -> None:
        failure = None
        if self._ranks.is_first:
            try:
                while not self._fill_alone(store, title, paths, size, encode, *options):
                    store.wait()
            except (ValueError, OSError, StoppedError) as error:
                failure = error
        if any(self._ranks.sums(f"{title}", float(failure is not None))):
            raise failure or RuntimeError(f"{title} failed on the first process")
        store.refresh()

    def _fill_alone(
        self, store, title, paths: Sequence[Media], size: int, encode, *options
    ) -> bool:
        """Computes missing features; returns False if another process is doing so."""
        if all(self._key(path) in store for path in paths):
            return True
        try:
            store.open()
        except FolderInUseError:
            return False
        missing = list({self._key(p): p for p in paths if self._key(p) not in store}.values())
        self._reporter.start(title, len(paths), len(paths) - len(missing))
        flushed = time.monotonic()
        said = False
        try:
            with StopRequest() as stop:
                for at in range(0, len(missing), size):
                    group = missing[at : at + size]
                    for path, pieces in zip(group, encode(group, *options), strict=True):
                        store.write(self._key(path), pieces)
                    if not said:
                        each = needed_bytes([p.shape for p in pieces], store.dtype)
                        self._reporter.say(
                            f"{title}: {len(missing)} items, about"
                            f" {each * len(missing) / 1e6:.1f} MB in {self._folder}"
                        )
                        said = True
                    self._reporter.advance(len(group))
                    if stop.signal or time.monotonic() - flushed > _FLUSH_SECONDS:
                        store.flush()
                        flushed = time.monotonic()
                    if stop.signal:
                        raise StoppedError(f"stopped in {title}", stop.signal)
        finally:
            store.close()
            self._reporter.finish()
        return True

    def _encode(self, paths: Sequence[Media], kind: str) -> list[list[Tensor]]:
        encoder, options = self._encoder(SENSES[kind]), self._processor.media_options
        read = [_named(path, read_media, kind, path, encoder, options) for path in paths]
        return encode_media(kind, read, encoder, options)

    @torch.inference_mode()
    def _run_body(self, paths, kind: str, connector) -> Iterator[Sequence[Tensor]]:
        weight = connector.query_tokens
        for path in paths:
            # Pieces of a recording may differ in length.
            pieces = self._stores[kind].read(self._key(path))
            yield [
                connector.hidden_states(piece[None].to(weight.device, weight.dtype))[0]
                for piece in pieces
            ]

    def _settings(self, kind: str) -> dict:
        # Once: the hash of an encoder reads all of its weights.
        if kind not in self._described:
            self._described[kind] = self._describe(kind)
        return self._described[kind]

    def _describe(self, kind: str) -> dict:
        encoder, options = self._encoder(SENSES[kind]), asdict(self._processor.media_options)
        own = {
            "image": ("image_aspect_ratio",),
            "video": ("image_aspect_ratio", "video_num_frames"),
            "speech": ("speech_max_frames",),
            "audio": (),
        }[kind]
        name = chosen_encoder(getattr(self._processor, f"{SENSES[kind]}_encoder"), SENSES[kind])
        code = {"code": code_digest(encoder)} if is_outside(name) else {}
        return {
            "encoder": f"{kind}-{encoder.name}",
            "weights": encoder.fingerprint(),
            **code,
            "computed_in": str(next(encoder.parameters(), torch.empty(0)).dtype),
            **{name: options[name] for name in own},
        }

    def _encoder(self, sense: str) -> FrozenEncoder:
        if sense not in self._encoders:
            encoder = build_encoder(getattr(self._processor, f"{sense}_encoder"), sense)
            if self._precision == "bf16" and sense != "audio":
                encoder = encoder.to(torch.bfloat16)
            self._encoders[sense] = encoder.to(self._device)
        return self._encoders[sense]

    def _key(self, path: Media) -> str:
        if path not in self._keys:
            self._keys[path] = content_key(path, self._memo)
        return self._keys[path]


def _by_kind(media: Iterable[KindAndFile]) -> dict[str, list[Media]]:
    found: dict[str, dict[Media, None]] = {}
    for kind, path in media:
        found.setdefault(kind, {})[path] = None
    return {kind: list(paths) for kind, paths in found.items()}


def _named(path: Media, read, *arguments):
    """Calls `read` and adds the file's path to its ValueErrors."""
    try:
        return read(*arguments)
    except ValueError as error:
        text = str(error)
        raise ValueError(text if str(path) in text else f"{path}: {text}") from error


def _body_digest(connector: nn.Module) -> str:
    """Hash of a connector's weights and configurations, except for its projector."""
    digest = hashlib.sha256()
    for module in connector.modules():
        if isinstance(config := getattr(module, "config", None), PreTrainedConfig):
            fields = config.to_dict()
            fields.pop("transformers_version", None)
            digest.update(json.dumps(fields, sort_keys=True, default=str).encode())
    for name, tensor in connector.state_dict().items():
        if not name.startswith("projector."):
            digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
