"""Speaks phrases with eSpeak NG; runs as a program of its own, which loads nothing of this package.

eSpeak NG keeps noise generators and oscillator phases from one phrase to the next, and neither its
own reset nor `espeak_ng_SetRandSeed` clears them all: a phrase spoken twice in a process differs.
So each phrase is spoken in a fork of a process that has spoken none, where it always comes out the
same. A caller that holds threads must not fork, hence the program of its own.

    python espeak.py LIBRARY DATA < phrases.json > waves.npz

reads a JSON list of `[text, voice]` and writes `wave` (int16, all phrases end to end),
`samples` (int64, how many belong to each) and `sample_rate`.
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
_SEED = 1

_Callback = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p
)


class Espeak:
    """The library, set up and ready to speak.

    Args:
        library: path of `libespeak-ng.so`.
        data: path of the folder `espeak-ng-data`.

    Raises:
        ValueError: If the library refuses the data folder.
    """

    def __init__(self, library: str, data: str) -> None:
        self.library = ctypes.CDLL(library)
        self.variants = Path(data, "voices", "!v")
        self.chunks: list[bytes] = []
        self.sample_rate = self.library.espeak_Initialize(_SYNCHRONOUS, 0, data.encode(), 0)
        if self.sample_rate <= 0:
            raise ValueError(f"{data}: eSpeak NG cannot use this folder as its data")
        # Setting up seeds the noise generator with the time of day.
        self.library.espeak_ng_SetRandSeed(ctypes.c_long(_SEED))
        # Kept on self: the library calls it for as long as it lives.
        self.callback = _Callback(self._receive)
        self.library.espeak_SetSynthCallback(self.callback)

    def _receive(self, samples, count: int, events) -> int:
        if samples and count > 0:
            self.chunks.append(ctypes.string_at(samples, 2 * count))
        return 0

    def speak(self, text: str, voice: str) -> bytes:
        """Says `text`; returns int16 samples, which depend on what was said before."""
        if not text.strip():
            raise ValueError(f"text ({text!r}) must hold something to say")
        self.chunks.clear()
        # The library takes an unknown variant without a word and speaks in the plain voice.
        _, plus, variant = voice.partition("+")
        unknown = plus and not (self.variants / variant).is_file()
        if unknown or self.library.espeak_SetVoiceByName(voice.encode()) != 0:
            raise ValueError(f"voice ({voice!r}) must be one that eSpeak NG has")
        raw = text.encode()
        status = self.library.espeak_Synth(
            raw, len(raw) + 1, 0, _POSITION_CHARACTER, 0, _UTF8, None, None
        )
        if status != 0 or not self.chunks:
            raise ValueError(f"eSpeak NG cannot say {text!r} in voice {voice!r}")
        return b"".join(self.chunks)

    def speak_afresh(self, text: str, voice: str) -> bytes:
        """Says `text` in a fork of this process, so that this process stays as it is."""
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            status = 1
            try:
                os.close(reader)
                with os.fdopen(writer, "wb") as pipe:
                    pipe.write(self.speak(text, voice))
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
    """Speaks the phrases of standard input to standard output."""
    try:
        espeak = Espeak(sys.argv[1], sys.argv[2])
        waves = [espeak.speak_afresh(text, voice) for text, voice in json.load(sys.stdin)]
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
