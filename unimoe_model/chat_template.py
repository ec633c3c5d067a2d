"""Conversations in the chat template of an LLM's own tokenizer."""

import re
from collections.abc import Mapping, Sequence

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from unimoe_model.prompt import PLACEHOLDERS

# Templates of reasoning LLMs then write an empty thinking block; others ignore the option.
_WITHOUT_THOUGHTS = {"enable_thinking": False}


def chat_text(
    turns: Sequence[tuple[str, str | None]], tokenizer: PreTrainedTokenizerBase, system: str = ""
) -> tuple[str, list[tuple[int, int]]]:
    """Renders a conversation with the chat template of a tokenizer.

    Args:
        turns: pairs of the user's message and the answer. If the last answer is None or empty, the
            text ends with the generation prompt.
        tokenizer: a tokenizer with a chat template.
        system: system message; empty for none.

    Returns:
        The text, and the start and end of each answer in it, end-of-turn token included.

    Raises:
        ValueError: If there are no turns, a message of the user is empty, the template rejects the
            conversation, or it does not render answers unchanged between the generation prompt and
            a special token.
    """
    if not turns or not all(user for user, _ in turns):
        raise ValueError(f"turns ({list(turns)}) must hold at least one, none of the user empty")
    messages = [{"role": "system", "content": system}] if system else []
    for user, answer in turns:
        messages.append({"role": "user", "content": user})
        if answer:
            messages.append({"role": "assistant", "content": answer})
    text = _rendered(messages, tokenizer, not turns[-1][1], _WITHOUT_THOUGHTS)
    answers = []
    for number, message in enumerate(messages):
        if message["role"] == "assistant":
            prompts = [
                _rendered(messages[:number], tokenizer, True, options)
                for options in (_WITHOUT_THOUGHTS, {})
            ]
            answers.append(_answer(text, prompts, message["content"], tokenizer))
    return text, answers


def end_of_turn_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Id of the token that ends an answer in the tokenizer's chat template.

    Raises:
        ValueError: If `chat_text` raises it for a conversation of one turn.
    """
    text, [(_, stop)] = chat_text([("a", "b")], tokenizer)
    last = re.search(f"(?:{_specials(tokenizer)})$", text[:stop])
    return tokenizer.convert_tokens_to_ids(last[0])


def _rendered(
    messages: Sequence[Mapping[str, str]],
    tokenizer: PreTrainedTokenizerBase,
    add_generation_prompt: bool,
    options: Mapping[str, bool],
) -> str:
    try:
        return tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt, **options
        )
    except TemplateError as error:
        roles = ", ".join(message["role"] for message in messages)
        raise ValueError(
            f"chat template of the tokenizer refuses a conversation of {roles}: {error}"
        ) from error


def _answer(
    text: str, prompts: Sequence[str], answer: str, tokenizer: PreTrainedTokenizerBase
) -> tuple[int, int]:
    """Start and end, in the text, of the answer that follows one of the prompts."""
    start = max((len(prompt) for prompt in prompts if text.startswith(prompt)), default=None)
    pattern = rf"\s*{re.escape(answer.strip())}\s*(?:{_specials(tokenizer)})"
    match = None if start is None else re.compile(pattern).match(text, start)
    if match is None:
        raise ValueError(
            f"chat template of the tokenizer must show the answer {answer[:40]!r} as it is, between"
            " the generation prompt and a special token; prompt_format 'vicuna' does without it"
        )
    return start, match.end()


def _specials(tokenizer: PreTrainedTokenizerBase) -> str:
    """Pattern that matches special tokens other than media placeholders."""
    tokens = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return "|".join(map(re.escape, sorted(tokens - set(PLACEHOLDERS.values()), reverse=True)))
