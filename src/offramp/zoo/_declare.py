"""What an entry of the zoo declares about how its model is used: plain values that a bundle can carry."""

from __future__ import annotations

from typing import TypedDict


class Generation(TypedDict, total=False):
    """How text is generated token by token; a model that generates none has an empty one.

    ``prompt`` are the token ids that the decoder starts from, ``stop`` those that end the text, ``suppress`` those
    that are never chosen, and ``suppress_first`` those that are not chosen as the first token after the prompt.
    ``max_length`` counts all tokens of the decoder, the prompt's too. ``template``, where there is one, is a Python
    format string that puts a user's ``{text}`` between the marks that the model was trained with.
    """

    prompt: list[int]
    stop: list[int]
    suppress: list[int]
    suppress_first: list[int]
    max_length: int
    template: str


class Audio(TypedDict, total=False):
    """How sound becomes the model's features, as arguments of `offramp.runtime.preprocess.audio.log_mel`.

    ``rate`` in samples a second, ``n_fft`` and ``hop`` in samples, ``mels`` bands, ``seconds`` of sound in one input.
    """

    rate: int
    n_fft: int
    hop: int
    mels: int
    seconds: int
