"""A processor of images and text as the settings of a bundle: what it gives its tokenizer, tried on texts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import tokenizers
import torch
import transformers

from offramp.bundle.preprocessing import ImageText, Marked
from offramp.pretrained import own_generate, tokenization
from offramp.pretrained.example_inputs import placeholder
from offramp.pretrained.image_processor import PIXELS, noise
from offramp.runtime.preprocess import image_text
from offramp.runtime.preprocess.image_text import Places

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

_TEXTS = ("a small cat", "What is this, isn't it?\nAnswer: 42 Bäume", "x")
_ORDERS = ("{mark}{text}", "{mark}\n{text}", "{text} {mark} {text}", "{text}{mark}", "{mark}")
_SIZE = (64, 48)
_BEFORE, _BEHIND = "OFFRAMPBEFORE", "OFFRAMPBEHIND"


def load(source: str) -> Any | None:
    """The processor of a directory or hub id that takes images and text; None where there is none.

    Raises:
        ValueError: there is one, and transformers cannot load it.
    """
    found = tokenization.loaded(transformers.AutoProcessor, source, tokenization.PROCESSORS)
    return found if hasattr(found, "tokenizer") and hasattr(found, "image_processor") else None


def image_text_settings(
    processor: Any,
    tokenizer: str,
    model: PreTrainedModel,
    inputs: Mapping[str, Tensor],
    note: Callable[[str], None],
) -> ImageText:
    """What the processor makes of a text that comes with an image; ``tokenizer`` is the text of a ``tokenizer.json``.

    ``inputs`` are example inputs, which have as many places for an image as the model has features of one. A chat
    template that cannot be followed goes to ``note``.

    Raises:
        ValueError: no reading of it gives what it gives; the message says what is different.
    """
    maker = _Maker(processor, tokenizer, model, inputs)
    found = maker.settings()
    texts = list(maker.texts(found))
    for text in texts:
        wanted, made = maker.expected(text), image_text.ids(text, found, maker.places, maker.encode)
        if wanted != made:
            raise ValueError(f"{maker.name} makes {wanted} of {text!r} and an image, what was read of it {made}")
    found = replace(found, inputs={name: maker.marked(name, texts) for name in maker.beside()})
    if maker.template is not None and model.can_generate():
        try:
            found = maker.with_template(found)
            tokenization.note_day(processor, note)
        except ValueError as error:
            note(f"the bundle has no chat template for a text with an image: {error}")
    return maker.with_prompt(found, texts) if model.can_generate() else found


@dataclass
class _Seen:
    """What a processor made of a text and an image."""

    texts: list[str]  # that it gave its tokenizer
    special: bool
    made: Mapping[str, Any]

    @property
    def ids(self) -> list[int]:
        return [int(token) for token in np.asarray(self.made[tokenization.TOKENS]).reshape(-1)]


class _Recorder:
    """A tokenizer that keeps what it is given."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.calls: list[tuple[list[str], bool]] = []

    def __call__(self, text: Any = None, *args: Any, **options: Any) -> Any:
        texts = [text] if isinstance(text, str) else list(text or ())
        self.calls.append((texts, bool(options.get("add_special_tokens", True))))
        return self.tokenizer(text, *args, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)


class _Maker:
    """Reads one processor."""

    def __init__(self, processor: Any, tokenizer: str, model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> None:
        self.processor, self.model, self.inputs = processor, model, inputs
        self.name = type(processor).__name__
        self.image = noise(_SIZE, "RGB")
        self._tokenizer = tokenizers.Tokenizer.from_str(tokenizer)
        self.places: Places | None = None
        if (kept := placeholder(model, inputs)) is not None:
            token = self._tokenizer.id_to_token(kept[0])
            if token is None:
                raise ValueError(f"the tokenizer has no token {kept[0]}, which stands for an image")
            self.places = Places(token, *kept)
        self.template = getattr(processor, "chat_template", None)

    def encode(self, text: str, special: bool) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=special).ids)

    def settings(self) -> ImageText:
        """How it joins the two; ValueError where it cannot be seen."""
        bare, problem = self._tried(self._bare)
        marked: ImageText | None = None
        for mark in self._marks() if self.places else ():
            marked, why = self._tried(partial(self._marked, mark))
            problem = problem or why
            if marked is not None:
                break
        if bare is None and marked is None:
            raise ValueError(problem)
        if bare is None or marked is None:
            return bare or replace(marked or ImageText(), bare=None)
        if bare.special != marked.special:
            raise ValueError(f"{self.name} adds special tokens to a text with {marked.mark!r} or to one without alone")
        return replace(marked, bare=bare.bare, ahead=bare.ahead)

    def texts(self, found: ImageText) -> Iterator[str]:
        """Texts that the settings are for."""
        if found.bare is not None:
            yield from _TEXTS
        for order in _ORDERS if found.mark else ():
            for text in _TEXTS[: 2 if "{text}" in order else 1]:
                yield order.replace("{mark}", found.mark or "").replace("{text}", text)

    def expected(self, text: str) -> list[int]:
        return self._seen(text).ids

    def beside(self) -> list[str]:
        """Further inputs over the tokens that the model takes."""
        shape = self.inputs[tokenization.TOKENS].shape
        known = (tokenization.TOKENS, tokenization.MASK)
        found = [name for name, value in self.inputs.items() if name not in known and value.shape == shape]
        return found if self.places else []

    def marked(self, name: str, texts: Sequence[str]) -> Marked:
        """What an input holds, by the ids; ValueError where those do not decide it."""
        found: dict[int, set[int]] = {}
        for text in texts:
            made = self._seen(text)
            if name not in made.made:
                raise ValueError(f"{self.name} makes no {name}, which {type(self.model).__name__} takes")
            for token, value in zip(made.ids, np.asarray(made.made[name]).reshape(-1).tolist(), strict=True):
                found.setdefault(token, set()).add(value)
        every = {value for values in found.values() for value in values}
        if any(len(values) > 1 for values in found.values()) or len(every) > 2:
            raise ValueError(f"{self.name} makes a {name} that does not follow from the token ids")
        (other,) = found[next(token for token in found if self._is_text(token))]
        ids = tuple(sorted(token for token, values in found.items() if values != {other}))
        (value,) = every - {other} or {other}
        return Marked(ids, value, other)

    def _is_text(self, token: int) -> bool:
        return token in {id_ for text in _TEXTS for id_ in self.encode(text, False)}

    def with_template(self, found: ImageText) -> ImageText:
        """The settings with the chat template around an image and a text; ValueError where it makes something else."""
        whole = self._chat(tokenization.MARK_OF_TEXT, tokenize=False)
        if whole.count(tokenization.MARK_OF_TEXT) != 1 or found.mark is None or whole.count(found.mark) != 1:
            raise ValueError(f"the chat template makes {whole!r} of an image and a text")
        template = whole.replace(tokenization.MARK_OF_TEXT, "{text}")
        made = [np.asarray(self._chat(text, tokenize=True)).reshape(-1).tolist() for text in _TEXTS]
        for special in (False, True):
            new = replace(found, template=template, template_special=special)
            chats = [image_text.chat(text, new, None) or "" for text in _TEXTS]
            if made == [image_text.ids(text, new, self.places, self.encode, special) for text in chats]:
                return new
        raise ValueError(
            f"{self.name} makes {made[0]} of a chat with {_TEXTS[0]!r} and an image, and it is not known how"
        )

    def with_prompt(self, found: ImageText, texts: Sequence[str]) -> ImageText:
        """The settings with what the model's own ``generate`` makes of the ids; ValueError for anything else."""
        if not own_generate.has_own(self.model):
            return found
        for text in texts:
            made = self._seen(text)
            names = self.inputs.keys() & made.made.keys() | {PIXELS, tokenization.TOKENS, tokenization.MASK}
            given = {name: torch.tensor(made.made[name]) for name in names if name in made.made}
            fed, ids = own_generate.started(self.model, given).ids, made.ids
            dropped = len(ids) - len(fed)
            first = fed[0] if fed[0] != ids[0] else None
            new = replace(found, first=first, dropped=dropped)
            if dropped < 0 or image_text.prompt(ids, new) != fed or (text != texts[0] and new != found):
                raise ValueError(f"the generate of {type(self.model).__name__} starts from {fed} instead of {ids}")
            found = new
        return found

    def _marks(self) -> list[str]:
        own = getattr(self.processor, "image_token", None)
        names = [str(own)] if own else []
        return list(dict.fromkeys([*names, *([self.places.name] if self.places else [])]))

    def _tried(self, read: Callable[[], ImageText]) -> tuple[ImageText | None, str]:
        try:
            return read(), ""
        except ValueError as error:
            return None, str(error)

    def _bare(self) -> ImageText:
        """How it takes a text that says nothing of the image."""
        seen = self._seen(_BEFORE)
        whole = self._whole(seen, _BEFORE)
        frame = self._frame(whole).replace(_BEFORE, "{text}")
        ahead = False
        if self.places and "{image}" not in frame:
            self._counted(seen)
            ahead = seen.ids[: self.places.features] == [self.places.token] * self.places.features
            if not ahead:
                raise ValueError(f"{self.name} puts an image's tokens into {seen.ids}, and it is not known how")
        return ImageText(bare=frame, ahead=ahead, special=seen.special)

    def _marked(self, mark: str) -> ImageText:
        """How it takes a text with a mark where the image goes."""
        seen = self._seen(_BEFORE + mark + _BEHIND)
        self._counted(seen)
        before, _, behind = self._whole(seen, _BEFORE, _BEHIND).partition(_BEFORE)
        inside, _, last = behind.partition(_BEHIND)
        place = self._frame(inside)
        if place.count("{image}") != 1:
            raise ValueError(f"{self.name} makes {inside!r} of {mark!r}")
        return ImageText(mark=mark, place=place, marked=f"{before}{{text}}{last}", special=seen.special)

    def _counted(self, seen: _Seen) -> None:
        """ValueError where an image has other than as many places as the model has features."""
        assert self.places is not None
        found = seen.ids.count(self.places.token)
        if found != self.places.features:
            raise ValueError(
                f"{self.name} keeps {found} places for an image, {type(self.model).__name__} has "
                f"{self.places.features} features of one"
            )

    def _frame(self, text: str) -> str:
        """A text with ``{image}`` for the places of an image."""
        return text.replace(self.places.name * self.places.features, "{image}") if self.places else text

    def _whole(self, seen: _Seen, *parts: str) -> str:
        """The text with all of these parts that the tokenizer was given."""
        found = [text for text in seen.texts if all(text.count(part) == 1 for part in parts)]
        if len(found) != 1:
            raise ValueError(f"{self.name} gives its tokenizer {seen.texts}")
        return found[0]

    def _seen(self, text: str) -> _Seen:
        recorder = _Recorder(self.processor.tokenizer)
        self.processor.tokenizer = recorder
        try:
            made = self.processor(images=self.image, text=text, return_tensors="np")
        except Exception as error:
            raise ValueError(f"{self.name} fails on a text and an image: {tokenization.reason(error)}") from error
        finally:
            self.processor.tokenizer = recorder.tokenizer
        texts = [text for call, _ in recorder.calls for text in call]
        return _Seen(texts, any(special for _, special in recorder.calls), made)

    def _chat(self, text: str, *, tokenize: bool) -> Any:
        content = [{"type": "image", "image": self.image}, {"type": "text", "text": text}]
        try:
            return self.processor.apply_chat_template(
                [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=tokenize
            )
        except Exception as error:
            raise ValueError(f"its chat template fails on an image: {tokenization.reason(error)}") from error
