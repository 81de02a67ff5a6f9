import dataclasses

import numpy as np

from logitjax.data import TokenizerLike


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptTemplate:
    """The text around a question.

    The answer follows directly. Use one template for training, scoring and generation: the release
    of logit-difference unlearning has different spaces in one of them.

    Attributes:
        before: text before the question.
        after: text after it, up to the answer.
        add_bos: begin with the tokenizer's BOS token; None: as its ``add_bos`` says.

    >>> PromptTemplate.llama2().render("Who?")
    '[INST] Who? [/INST]'
    """

    before: str
    after: str
    add_bos: bool | None = None

    def render(self, question: str) -> str:
        """The prompt."""
        return self.before + question + self.after

    @staticmethod
    def llama2() -> "PromptTemplate":
        """The template of TOFU for Llama-2-chat."""
        return PromptTemplate(before="[INST] ", after=" [/INST]", add_bos=True)

    @staticmethod
    def phi() -> "PromptTemplate":
        """The template of TOFU for Phi-1.5."""
        return PromptTemplate(before="Question: ", after="\nAnswer: ")

    @staticmethod
    def chatml() -> "PromptTemplate":
        """The template of SmolLM2 and Qwen, without a system message."""
        return PromptTemplate(
            before="<|im_start|>user\n", after="<|im_end|>\n<|im_start|>assistant\n"
        )

    def encode(self, tokenizer: TokenizerLike, question: str) -> np.ndarray:
        """The tokens that an answer continues: int32 ``[time]``."""
        return self._encoded(tokenizer, self.render(question))

    def encode_answer(
        self,
        tokenizer: TokenizerLike,
        question: str,
        answer: str,
        *,
        max_length: int = 200,
        eos_id: int | None = None,
        end: bool = True,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Encode a question with its answer, and mark the answer's tokens, end token included.

        The row always begins with the result of `encode`. If the tokens of the whole text also
        begin that way (TOFU's code relies on it), it is encoded at once; otherwise prompt and
        answer are encoded separately.

        Args:
            max_length: maximum length of the row; the rest is cut off. TOFU uses 200,
                OpenUnlearning 512.
            eos_id: the end token, if it is not the tokenizer's.
            end: False for an answer without an end token.

        Returns:
            int32 ``[time]`` and bool ``[time]``.

        Raises:
            ValueError: the prompt alone takes ``max_length`` tokens.
        """
        prompt = self.encode(tokenizer, question)
        ids = self._encoded(tokenizer, self.render(question) + answer)
        # A tokenizer may join the prompt's last characters with the answer's first.
        if not np.array_equal(ids[: len(prompt)], prompt):
            ids = np.concatenate([prompt, np.asarray(tokenizer.encode(answer), np.int32)])
        mark = tokenizer.eos_id if eos_id is None else eos_id
        if end and mark is not None:
            ids = np.append(ids, np.int32(mark))
        # The end token is dropped first.
        ids = ids[:max_length]
        if len(prompt) >= len(ids):
            raise ValueError(
                f"no token of the answer fits: the prompt of {question[:60]!r} takes {len(prompt)} "
                f"of max_length={max_length} tokens"
            )
        # The end token belongs to the answer.
        return ids, np.arange(len(ids)) >= len(prompt)

    def _encoded(self, tokenizer: TokenizerLike, text: str) -> np.ndarray:
        local = getattr(tokenizer, "add_bos", False)
        add_bos = bool(local if self.add_bos is None else self.add_bos)
        return np.asarray(tokenizer.encode(text, add_bos=add_bos), np.int32)
