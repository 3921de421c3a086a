r"""lm-evaluation-harness (EleutherAI) through a compressed cache: its model `kvloom`.

    python -m kvloom.evaluation.lm_eval run --model kvloom --tasks hellaswag \
        --model_args pretrained=testbed,recipe=h2o,budget=25%

or, in Python, `register()` and `lm_eval.simple_evaluate(model="kvloom", model_args={...})`. Without the harness
this module still imports, and `Scorer` does its arithmetic.

What stands before the first scored or generated token is compressed, all of it: the harness hands context and
question over as one. Then every token goes in by itself, the last one of the prompt included, so that each
log-likelihood is of a token that the model predicts from the compressed cache.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kvloom.core.budget import Budget
from kvloom.core.recipe import Recipe
from kvloom.evaluation import answering, compare
from kvloom.evaluation.decoders import CacheDecoder, WatchedCache, feed_prompt

NAME = "kvloom"
NEW_TOKENS = 256  # where a task does not say how many

Pair = tuple[
    list[int], list[int]
]  # token ids of a context, which is not empty, and of what follows it


class Scorer:
    """The three questions that the harness asks of a model, answered one request at a time.

    Args:
        pretrained: folder or hub name of a model, `"testbed"` for the bundled one. recipe, budget: of the
            cache. dtype: `"bfloat16"`, `"float16"` or `"float32"`. device: `"auto"`: an accelerator if there
            is one. prefill_chunk: tokens per forward of a context, 0: one forward. max_length: tokens of
            context and continuation at most, older ones are cut off; None: what the model was made for.
            batch_size, max_batch_size: the harness's; every request is its own batch here.

    Raises:
        ValueError: on a model, recipe or budget that cannot be used.
    """

    def __init__(
        self, pretrained: str, recipe: str = "none", budget: str | int | None = None,
        dtype: str = "bfloat16", device: str = "auto", prefill_chunk: int = 0,
        max_length: int | None = None, batch_size: int | str = 1, max_batch_size: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.model, self.tokenizer = compare.load_model(pretrained, dtype, _device(str(device)))
        self.recipe = Recipe.parse(recipe)
        self.budget = None if budget is None else Budget.parse(budget)
        self.prefill_chunk = int(prefill_chunk)
        config = self.model.config.get_text_config(decoder=True)
        self.max_length = int(
            max_length or getattr(config, "max_position_embeddings", None) or 2048
        )
        self._decoder()  # recipe, budget and model fit together, or it is said now

    # -- what the harness asks -------------------------------------------------------------------

    @torch.inference_mode()
    def loglikelihood(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """For each (context, continuation): its natural log-probability, and whether it is greedy.

        Requests of the same context share its prefill; each continuation goes on from a copy of the cache.
        """
        pairs = [self._encode_pair(*request.args) for request in requests]
        groups: dict[tuple[int, ...], list[int]] = {}
        for i, (start, _) in enumerate(pairs):
            groups.setdefault(tuple(start), []).append(i)
        found: dict[int, tuple[float, bool]] = {}
        for context, members in groups.items():
            prompt = self._prefilled(list(context))
            for i in members:
                decoder = prompt if i == members[-1] else self._copy(prompt)
                found[i] = _follow(decoder, context[-1], pairs[i][1])
        answers = [found[i] for i in range(len(requests))]
        self._remember("loglikelihood", requests, answers)
        return answers

    @torch.inference_mode()
    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """For each text: the log-probability of all of it, in windows where it is longer than the model's."""
        answers = []
        for request in requests:
            (text,) = request.args
            ids = answering.encode(self.tokenizer, text)
            total = 0.0
            for context, rest in windows(ids, self.prefix_token, self.max_length):
                total += _follow(self._prefilled(context), context[-1], rest)[0]
            answers.append(total)
        self._remember("loglikelihood_rolling", requests, answers)
        return answers

    @torch.inference_mode()
    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """For each (context, options): what the model writes greedily, up to the first stop string.

        Raises ValueError if the options ask for sampling.
        """
        answers = [self._generate(*request.args) for request in requests]
        self._remember("generate_until", requests, answers)
        return answers

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """A conversation as the model's tokenizer writes it."""
        return str(
            self.tokenizer.apply_chat_template(
                chat_history, tokenize=False, add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )  # fmt: skip

    @property
    def tokenizer_name(self) -> str:
        """Names the tokenizer in the harness's records."""
        return str(getattr(self.tokenizer, "name_or_path", "")).replace("/", "__")

    # -- tokens ----------------------------------------------------------------------------------

    @property
    def prefix_token(self) -> int:
        """What stands before a text without context. Raises ValueError if the tokenizer has no such."""
        for name in ("bos_token_id", "eos_token_id"):
            token = getattr(self.tokenizer, name, None)
            if token is not None:
                return int(token)
        raise ValueError(
            "a text without context needs a tokenizer with a token that begins or ends texts"
        )

    def _encode_pair(self, context: str, continuation: str) -> Pair:
        """Spaces at the end of a context belong to what follows; the text is split where it was encoded."""
        bare, text = context.rstrip(), context + continuation
        if not bare:
            return self._cut([self.prefix_token], answering.encode(self.tokenizer, text))
        whole = answering.encode(self.tokenizer, text, special=True)
        start = answering.encode(self.tokenizer, bare, special=True)
        return self._cut(start, whole[len(start) :])

    def _cut(self, context: list[int], rest: list[int]) -> Pair:
        """Without the oldest tokens of a context that is too long; the last token needs no position."""
        room = self.max_length + 1 - len(rest)
        if room < 1:
            raise ValueError(
                f"a continuation of {len(rest)} tokens: the model takes {self.max_length} at most"
            )
        return context[-room:], rest

    # -- through the cache -----------------------------------------------------------------------

    def _decoder(self) -> CacheDecoder:
        return CacheDecoder(self.model, WatchedCache(self.model, self.recipe, self.budget))

    def _prefilled(self, context: list[int]) -> CacheDecoder:
        """All of a context but its last token is in, and compressed."""
        decoder = self._decoder()
        if len(context) > 1:
            feed_prompt(decoder, torch.tensor(context[:-1]), self.prefill_chunk)
        return decoder

    def _copy(self, decoder: CacheDecoder) -> CacheDecoder:
        return CacheDecoder(self.model, copy.deepcopy(decoder.cache))

    def _generate(self, context: str, options: dict[str, Any]) -> str:
        if options.get("do_sample") and options.get("temperature", 1.0):
            raise ValueError(f"generation options {options}: kvloom generates greedily only")
        given = options.get("until") or []
        until = [given] if isinstance(given, str) else list(given)
        names = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
        limit = next((int(options[n]) for n in names if options.get(n)), NEW_TOKENS)
        ids = answering.encode(self.tokenizer, context, special=True) or [self.prefix_token]
        room = self.max_length - limit
        if room < 1:
            raise ValueError(
                f"{limit} new tokens: the model takes {self.max_length} with the prompt"
            )
        ids = ids[-room:]
        decoder = self._prefilled(ids)
        logits = decoder.feed(torch.tensor(ids[-1:]))

        def stop(chosen: list[int]) -> bool:
            text = str(self.tokenizer.decode(chosen))
            return any(mark in text for mark in until)

        ends = answering.end_tokens(self.model, self.tokenizer)
        text = str(self.tokenizer.decode(answering.greedy(decoder, logits, limit, ends, stop)))
        cut = [text.index(mark) for mark in until if mark in text]
        return text[: min(cut)] if cut else text

    def _remember(self, kind: str, requests: Sequence[Any], answers: Sequence[Any]) -> None:
        """Tell the harness's own cache of answers, if it keeps one."""
        hook = getattr(self, "cache_hook", None)
        if hook is not None:
            for request, answer in zip(requests, answers, strict=True):
                hook.add_partial(kind, request.args, answer)


def _device(name: str) -> str:
    """The harness's command line says `"cuda:0"` where nobody named a device."""
    if name.startswith("cuda") and not torch.cuda.is_available():
        logging.getLogger(__name__).warning("device %r: there is no CUDA here, so 'auto'", name)
        return "auto"
    return name


def _follow(decoder: CacheDecoder, last: int, rest: Sequence[int]) -> tuple[float, bool]:
    """Log-probability of the tokens `rest` behind a context's `last` one, and whether they are greedy."""
    total, greedy = 0.0, True
    for fed, token in zip([last, *rest], rest, strict=False):
        logits: Tensor = decoder.feed(torch.tensor([fed]))[-1]
        total += float(torch.log_softmax(logits.float(), dim=-1)[token])
        greedy &= int(logits.argmax()) == token
    return total, greedy


def windows(ids: Sequence[int], prefix: int, length: int) -> list[Pair]:
    """A long text as (context, what to predict), each token once, by forwards of at most `length` tokens.

    As the harness splits it: the first window begins with the prefix alone, the last one looks back as far
    as it can.
    """
    found: list[Pair] = []
    for start in range(0, len(ids), length):
        rest = list(ids[start : start + length])
        first = max(0, start + len(rest) - length - 1)
        found.append((list(ids[first:start]) if start else [prefix], rest))
    return found


def register() -> type:
    """Make the harness know the model `"kvloom"`; the class that it will use.

    Raises ImportError if the harness is not installed: pip install 'kvloom[eval]'.
    """
    try:
        from lm_eval.api.model import LM
        from lm_eval.api.registry import register_model
    except ImportError as error:
        raise ImportError(
            "the lm-evaluation-harness is not installed: pip install 'kvloom[eval]'"
        ) from error

    class KvloomLM(Scorer, LM):  # type: ignore[misc, unused-ignore]
        """See `Scorer`."""

        @property
        def device(self) -> torch.device:
            """Where the model is."""
            return torch.device(self.model.device)

    return register_model(NAME)(KvloomLM)  # type: ignore[no-any-return, unused-ignore]


def main() -> None:
    """The harness's own command line, with the model `kvloom` registered."""
    register()
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
