"""Text that comes from outside: questions, subtitles, memories, replies. It may hold anything, and stays text.

A model's tokenizer makes control tokens of some words: `<|im_end|>` ends a turn, `<|video_pad|>` stands for a frame.
They are meant where a prompt is built, and nowhere else, but anybody can write them, a policy too.
"""
import functools
import re


def as_text(text, tokenizer):
    """Text from outside as it may enter a prompt: no control token is left in it, because a space cuts each in two.

    `<|im_end|>` becomes `< |im_end|>`. All other text, such as <face_3>, stays as it is.
    """
    pattern = control_tokens(tuple(tokenizer.get_added_vocab()))
    return pattern.sub(r"\g<0> ", text) if pattern else text


@functools.cache
def control_tokens(words):
    """A pattern of the first letter of each of these words; None where there are none. <face_3> is no such word,
    whatever the tokenizer makes of it."""
    words = [re.escape(word) for word in words if not re.fullmatch(r"\s*.?|<face_\d+>", word)]
    return re.compile(f"(?=(?:{'|'.join(words)})).", re.DOTALL) if words else None


def whole_characters(text):
    """Text that UTF-8 can hold: half a surrogate pair, which JSON can spell, becomes U+FFFD.

    >>> whole_characters("a\\ud83d, b") == "a\\ufffd, b"
    True
    """
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
