"""A transformers model's generation_config as the settings of a bundle; what these cannot say is refused by name.

``model.generate`` is followed in all that decides which tokens come out:

- nothing set about lengths means 20 new tokens;
- ``max_new_tokens`` replaces ``max_length``, ``min_new_tokens`` replaces ``min_length``;
- without ``do_sample`` generation is greedy, whatever ``temperature`` says; with it ``top_k`` is 50 where unset;
- prompts in a table (``forced_decoder_ids``; ``language`` and ``task`` by ``lang_to_id`` and ``task_to_id``;
  ``no_timestamps_token_id``) go behind the start token.

What only makes generation faster, or adds to what is returned, changes no token and is left out.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from offramp.errors import PretrainedModelError

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel

_NEW_TOKENS, _TOP_K = 20, 50  # of `model.generate` where nothing is set

# Settings that change which tokens come out and that a bundle cannot say: their values that change nothing.
_UNSAID: dict[str, tuple[Any, ...]] = {
    "constraints": (None, []),
    "custom_generate": (None,),
    "diversity_penalty": (None, 0.0),
    "dola_layers": (None,),
    "encoder_no_repeat_ngram_size": (None, 0),
    "encoder_repetition_penalty": (None, 1.0),
    "exponential_decay_length_penalty": (None,),
    "force_words_ids": (None, []),
    "guidance_scale": (None, 1, 1.0),
    "max_time": (None,),
    "num_beam_groups": (None, 1),
    "num_return_sequences": (None, 1),
    "penalty_alpha": (None, 0.0),
    "sequence_bias": (None, {}, []),
    "token_healing": (None, False),
    "watermarking_config": (None,),
    # of speech models
    "compression_ratio_threshold": (None,),
    "condition_on_prev_tokens": (None, False),
    "logprob_threshold": (None,),
    "no_speech_threshold": (None,),
    "return_timestamps": (None, False),
}
_UNSAID_OF_SAMPLING: dict[str, tuple[Any, ...]] = {
    "epsilon_cutoff": (None, 0.0),
    "eta_cutoff": (None, 0.0),
    "top_h": (None,),
    "typical_p": (None, 1.0),
}
_UNSAID_OF_BEAMS: dict[str, tuple[Any, ...]] = {"do_sample": (None, False), "renormalize_logits": (None, False)}


def generation(model: PreTrainedModel, ignore: Collection[str] = ()) -> dict[str, Any]:
    """The settings that `offramp.save` takes as ``generation``; none for a model that cannot generate.

    Settings named in ``ignore`` count as not set.

    Raises:
        PretrainedModelError: settings that a bundle cannot say, all of them in one message; or a name in ``ignore``
            that is none.
    """
    config = getattr(model, "generation_config", None)
    if config is None or not model.can_generate():
        return {}
    get = _Reader(config, model.config, ignore)
    if unsaid := sorted(get.unsaid()):
        shown = "".join(f"\n  {name} = {value!r}" for name, value in unsaid)
        flags = " ".join(f"--ignore-generation {name}" for name, _ in unsaid)
        language = '"language": "en", say, in generation_config.json; or ' if "lang_to_id" in dict(unsaid) else ""
        raise PretrainedModelError(
            f"the generation_config of {type(model).__name__} asks for what a bundle cannot do:{shown}",
            hint=f"{language}{flags}, which generates without",
        )
    return {name: value for name, value in get.settings().items() if value not in (None, [], ())}


def is_all(model: PreTrainedModel) -> bool:
    """Whether the generation_config is all that decides: some classes have a ``generate`` with rules of its own.

    Prompts in a table are such rules that `generation` knows.
    """
    from transformers import GenerationMixin

    own = type(model).generate is not GenerationMixin.generate
    return not own or _Reader(model.generation_config, model.config, ()).has_table()


class _Reader:
    """A generation_config's values, those ignored as if they were not set."""

    def __init__(self, config: GenerationConfig, model_config: Any, ignore: Collection[str]) -> None:
        self._config, self._model_config, self._ignored = config, model_config, frozenset(ignore)
        known = {*vars(config), *_UNSAID, *_UNSAID_OF_SAMPLING, *_UNSAID_OF_BEAMS}
        if unknown := sorted(self._ignored - known):
            raise PretrainedModelError(
                f"the generation_config has no {', '.join(unknown)}",
                hint=f"one of {', '.join(name for name, value in sorted(vars(config).items()) if value is not None)}",
            )
        self.samples = self("do_sample") is True
        self.beams = int(self("num_beams") or 1)

    def __call__(self, name: str, default: Any = None) -> Any:
        value = None if name in self._ignored else getattr(self._config, name, None)
        return default if value is None else value

    def unsaid(self) -> Iterator[tuple[str, Any]]:
        """Settings that decide tokens and have no place in a bundle, with their values."""
        asked = dict(_UNSAID)
        asked |= _UNSAID_OF_SAMPLING if self.samples else {}
        asked |= _UNSAID_OF_BEAMS if self.beams > 1 else {}
        for name, neutral in asked.items():
            value = self(name)
            if not any(value is item or value == item for item in neutral):
                yield name, value
        if self._detects_language():
            yield "lang_to_id", "a language is detected, since none is set"

    def _detects_language(self) -> bool:
        """Whether the row's first token is to be found by the model, among those of ``lang_to_id``."""
        if self("lang_to_id") is None or self("language") is not None:
            return False
        forced = self._forced() if self("task") is None else []
        return not forced or forced[0] is None

    def settings(self) -> dict[str, Any]:
        stop = _ids(self("eos_token_id"))
        bans = [_ids(word) for word in self("bad_words_ids", [])]
        return {
            "prompt": self._prompt(),
            "stop": stop,
            "stop_strings": _texts(self("stop_strings")),
            "suppress": _ids(self("suppress_tokens")),
            "suppress_first": _ids(self("begin_suppress_tokens")),
            "forced_first": next(iter(_ids(self("forced_bos_token_id"))), None),
            "forced_last": _ids(self("forced_eos_token_id")),
            "bad_words": [word for word in bans if word and not (len(word) == 1 and word[0] in stop)],
            "repetition_penalty": self._unless("repetition_penalty", 1.0),
            "no_repeat_ngram_size": self._unless("no_repeat_ngram_size", 0),
            "pad": next(iter(_ids(self("pad_token_id")) or stop), None),
            **self._lengths(),
            **self._choice(),
        }

    def _unless(self, name: str, neutral: Any) -> Any:
        value = self(name)
        return None if value == neutral else value

    def _lengths(self) -> dict[str, Any]:
        most: dict[str, Any] = {"max_new_tokens": self("max_new_tokens")}
        if most["max_new_tokens"] is None and (length := self._max_length()) is not None:
            most = {"max_length": length}
        elif most["max_new_tokens"] is None:
            most = {"max_new_tokens": _NEW_TOKENS}
        least = {"min_new_tokens": self("min_new_tokens")}
        if least["min_new_tokens"] is None:
            least = {"min_length": self("min_length")}
        return most | {name: value for name, value in least.items() if value}

    def _max_length(self) -> int | None:
        """``max_length``; where a prompt comes from a table, that is not counted, and positions are the limit."""
        length: int | None = self("max_length")
        positions: int | None = getattr(self._model_config, "max_target_positions", None)
        if not self.has_table() or positions is None:
            return length
        prompt = min(positions // 2 - 1, len(self._prompt()))
        return min((_NEW_TOKENS if length is None else length) + prompt, positions)

    def _choice(self) -> dict[str, Any]:
        asked = {name: self(name) for name in ("top_p", "min_p")}
        chosen: dict[str, Any] = {"temperature": 0.0}
        if self.samples:
            chosen = {
                "temperature": float(self("temperature", 1.0)),
                "top_k": self("top_k", _TOP_K) or None,
                "top_p": asked["top_p"] if asked["top_p"] != 1.0 else None,
                "min_p": asked["min_p"] or None,
            }
        return {
            **chosen,
            "beams": self.beams if self.beams > 1 else None,
            "length_penalty": self._unless("length_penalty", 1.0),
            "early_stopping": self._unless("early_stopping", False),
        }

    def _prompt(self) -> list[int]:
        """What a row starts with where a user gives nothing."""
        if not self._model_config.is_encoder_decoder:
            return _ids(self("bos_token_id"))[:1]
        start = _ids(self("decoder_start_token_id", self("bos_token_id")))[:1]
        return start + self._table() if self.has_table() else start

    def has_table(self) -> bool:
        """Whether the prompt is made from tables of languages and tasks, or position by position."""
        names = ("lang_to_id", "task_to_id", "no_timestamps_token_id")
        return bool(self._forced()) or any(getattr(self._config, name, None) is not None for name in names)

    def _table(self) -> list[int]:
        """The prompt behind the start token: language, task, no timestamps."""
        language, task, tasks = self("language"), self("task"), dict(self("task_to_id", {}))
        prompt = self._forced() if language is None and task is None else []
        if language is not None:
            prompt = [self._language(str(language)), *prompt[1:]]
        if task is not None and task not in tasks:
            raise PretrainedModelError(f"task {task!r} is none of {sorted(tasks)}", hint="--ignore-generation task")
        if task is not None:
            prompt = [*prompt, tasks[task]]
        elif language is not None and "transcribe" in tasks and not set(tasks.values()) & set(prompt):
            prompt = [*prompt, tasks["transcribe"]]
        ending = self("no_timestamps_token_id")
        if ending is not None and prompt[-1:] != [ending]:
            prompt = [*prompt, ending]
        return [token for token in prompt if token is not None]

    def _forced(self) -> list[int | None]:
        """The tokens of ``forced_decoder_ids`` from position 1 on, as far as they follow each other."""
        name = "forced_decoder_ids"
        pairs = self(name) or (None if name in self._ignored else getattr(self._model_config, name, None)) or []
        found: list[int | None] = []
        for place, token in pairs:
            if place != len(found) + 1:
                raise PretrainedModelError(
                    f"{name} = {pairs!r} has no token for place {len(found) + 1}", hint=f"--ignore-generation {name}"
                )
            found.append(token)
        return found

    def _language(self, language: str) -> int:
        from transformers.models.whisper.tokenization_whisper import TO_LANGUAGE_CODE

        known: dict[str, int] = self("lang_to_id", {})
        name = language.lower()
        for text in (name, f"<|{TO_LANGUAGE_CODE.get(name, name)}|>"):
            if text in known:
                return known[text]
        raise PretrainedModelError(
            f"language {language!r} is none of lang_to_id: {sorted(known)}", hint="--ignore-generation language"
        )


def _ids(value: Any) -> list[int]:
    """One id, several or None as a list; negative ones, by which old configurations say "none", are left out."""
    if value is None:
        return []
    items: Iterable[Any] = value if isinstance(value, Iterable) else [value]
    return [int(item) for item in items if int(item) >= 0]


def _texts(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else list(value or [])
