"""Synthesises phrases with eSpeak NG, as a separate program that imports nothing of this package.

eSpeak NG keeps the state of noise generators and oscillators from one phrase to the next, and
neither its reset nor `espeak_ng_SetRandSeed` clears all of it: a phrase spoken twice in a process
differs. Each phrase is therefore spoken in a fork of a process that has not spoken yet, which gives
the same samples every time. A process with threads must not fork, hence the separate program.

    python espeak.py LIBRARY DATA < phrases.json > waves.npz

reads a JSON list of `[text, voice]` or `[text, voice, words per minute]` and writes `wave` (int16,
all phrases end to end), `samples` (int64, how many belong to each) and `sample_rate`.
"""

import ctypes
import json
import os
import sys
from pathlib import Path

import numpy as np

_SYNCHRONOUS = 2  # AUDIO_OUTPUT_SYNCHRONOUS: samples go to the callback, none to a sound card
_UTF8 = 1  # espeakCHARS_UTF8
_POSITION_CHARACTER = 1
_RATE = 1  # espeakRATE
_SEED = 1

_Callback = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p
)


class Espeak:
    """The initialised eSpeak NG library.

    Args:
        library: path of `libespeak-ng.so`.
        data: path of the folder `espeak-ng-data`.

    Raises:
        ValueError: If the library rejects the data folder.
    """

    def __init__(self, library: str, data: str) -> None:
        self.library = ctypes.CDLL(library)
        self.variants = Path(data, "voices", "!v")
        self.chunks: list[bytes] = []
        self.sample_rate = self.library.espeak_Initialize(_SYNCHRONOUS, 0, data.encode(), 0)
        if self.sample_rate <= 0:
            raise ValueError(f"{data}: eSpeak NG cannot use this folder as its data")
        # Initialisation seeds the noise generator with the time of day.
        self.library.espeak_ng_SetRandSeed(ctypes.c_long(_SEED))
        # Kept on self: the library calls it throughout its life.
        self.callback = _Callback(self._receive)
        self.library.espeak_SetSynthCallback(self.callback)

    def _receive(self, samples, count: int, events) -> int:
        if samples and count > 0:
            self.chunks.append(ctypes.string_at(samples, 2 * count))
        return 0

    def speak(self, text: str, voice: str, rate: int | None = None) -> bytes:
        """Speaks `text`; returns int16 samples, which depend on earlier phrases.

        Args:
            text: English.
            voice: `accent+variant`.
            rate: words per minute; None for the rate of the voice.
        """
        if not text.strip():
            raise ValueError(f"text ({text!r}) must hold something to say")
        self.chunks.clear()
        # The library accepts an unknown variant silently and uses the plain voice.
        _, plus, variant = voice.partition("+")
        unknown = plus and not (self.variants / variant).is_file()
        if unknown or self.library.espeak_SetVoiceByName(voice.encode()) != 0:
            raise ValueError(f"voice ({voice!r}) must be one that eSpeak NG has")
        if rate is not None and self.library.espeak_SetParameter(_RATE, rate, 0) != 0:
            raise ValueError(f"eSpeak NG cannot speak at {rate} words per minute")
        raw = text.encode()
        status = self.library.espeak_Synth(
            raw, len(raw) + 1, 0, _POSITION_CHARACTER, 0, _UTF8, None, None
        )
        if status != 0 or not self.chunks:
            raise ValueError(f"eSpeak NG cannot say {text!r} in voice {voice!r}")
        return b"".join(self.chunks)

    def speak_afresh(self, text: str, voice: str, rate: int | None = None) -> bytes:
        """As `speak`, in a fork of this process, so that its own state does not change."""
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            status = 1
            try:
                os.close(reader)
                with os.fdopen(writer, "wb") as pipe:
                    pipe.write(self.speak(text, voice, rate))
                status = 0
            except ValueError as error:
                print(error, file=sys.stderr)
            finally:
                os._exit(status)
        os.close(writer)
        with os.fdopen(reader, "rb") as pipe:
            wave = pipe.read()
        if os.waitpid(child, 0)[1] != 0:
            raise ValueError(f"eSpeak NG failed on {text!r} in voice {voice!r}")
        return wave


def main() -> int:
    """Reads phrases from standard input and writes samples to standard output."""
    try:
        espeak = Espeak(sys.argv[1], sys.argv[2])
        waves = [espeak.speak_afresh(*phrase) for phrase in json.load(sys.stdin)]
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    np.savez(
        sys.stdout.buffer,
        wave=np.frombuffer(b"".join(waves), dtype=np.int16),
        samples=np.array([len(wave) // 2 for wave in waves], dtype=np.int64),
        sample_rate=espeak.sample_rate,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
