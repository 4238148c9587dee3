"""The model as lm-eval sees it. Rank 0 runs lm-eval; whatever it asks of the model is broadcast, and all ranks compute
it together.

Imported only where lm-eval is installed (training/eval_tasks.py).
"""

from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import (
    handle_stop_sequences,
    has_bos_prefix,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from models.scoring import Request
from training.builder import BuiltModel
from training.harness_ranks import broadcast, continue_text, score

SAMPLING = {"do_sample", "temperature", "top_k", "top_p"}
MAX_GEN_TOKS = 256
"""Of tasks that say nothing, as in lm-eval's Hugging Face model."""


class HarnessModel(TemplateLM):
    """The model on rank 0, with lm-eval's own tokenization. Its results are those of lm-eval's Hugging Face model
    (lm_eval.models.huggingface.HFLM) on an exported checkpoint."""

    def __init__(self, built: BuiltModel, tokenizer: Any, batch_size: int):
        """Args:
        tokenizer: of Transformers.
        """
        super().__init__()
        self._built, self.tokenizer, self._batch_size = built, tokenizer, batch_size
        self.max_length = built.config.train.sequence_length

    def finish(self, message: str | None = None) -> None:
        """Lets the other ranks return from `follow`."""
        broadcast(self._built, ("end", message))

    def _score(self, requests: list[Request]) -> list[tuple[float, int]]:
        broadcast(self._built, ("score", requests, self._batch_size))
        return score(self._built, requests, self._batch_size)

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        return self.eot_token_id if self.tokenizer.bos_token_id is None else self.tokenizer.bos_token_id

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer.name_or_path.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        if add_special_tokens is None and has_bos_prefix(string, self.tokenizer.decode(self.prefix_token_id)):
            add_special_tokens = False
        given = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return self.tokenizer.encode(string, **given)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        return super().loglikelihood(requests, disable_tqdm=True)

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        scored = []
        for _, context, continuation in requests:
            if not 0 < len(continuation) <= self.max_length:
                raise ValueError(
                    f"tasks: a continuation has {len(continuation)} tokens; the model scores 1 to "
                    f"train.sequence_length={self.max_length}"
                )
            # What does not fit is cut off on the left, one token more than the input has being the last label.
            scored.append(((context + continuation)[-(self.max_length + 1) :], len(continuation)))
        results = self._score(scored)
        return [(nats, greedy == count) for (nats, greedy), (_, count) in zip(results, scored, strict=True)]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        windows, owners = [], []
        for number, request in enumerate(requests):
            rolling = get_rolling_token_windows(
                self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for window in map(make_disjoint_window, rolling):
                windows.append((None, *window))
                owners.append(number)
        totals = [0.0] * len(requests)
        for owner, (nats, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[owner] += nats
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        return [self._generate(*request.args) for request in requests]

    def _generate(self, context: str, given: dict[str, Any]) -> str:
        kwargs: dict[str, Any] = dict(normalize_gen_kwargs(given, MAX_GEN_TOKS))
        eos = self.tokenizer.decode([self.eot_token_id], skip_special_tokens=False)
        until, most = handle_stop_sequences(kwargs.pop("until"), eos=eos), kwargs.pop("max_gen_toks")
        if unknown := sorted(kwargs.keys() - SAMPLING):
            raise ValueError(f"tasks: generation_kwargs {', '.join(unknown)} are not supported, only until, "
                             f"max_gen_toks, {', '.join(sorted(SAMPLING))}")  # fmt: skip
        if most >= self.max_length:
            raise ValueError(
                f"tasks: a task generates up to {most} tokens (max_gen_toks), which leaves no room for its prompt in "
                f"train.sequence_length={self.max_length}"
            )
        prompt = self.tok_encode(context)[-(self.max_length - most) :] or [self.prefix_token_id]
        settings = {
            "max_tokens": most,
            "temperature": kwargs.get("temperature", 1.0) if kwargs["do_sample"] else 0.0,
            "top_k": kwargs.get("top_k"),
            "top_p": kwargs.get("top_p"),
            "seed": 0,
            "eod_id": self.eot_token_id,
        }
        broadcast(self._built, ("continue", prompt, settings))

        def stop(tokens: list[int]) -> bool:
            text = self._decode(tokens)
            return any(term and term in text for term in until)

        found = continue_text(self._built, prompt, settings, stop)
        return postprocess_generated_text(self._decode(found), until, None)

    def _decode(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=True)
