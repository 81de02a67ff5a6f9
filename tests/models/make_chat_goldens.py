"""Write what transformers makes of our chat templates; run it where transformers is installed."""

import json
import pathlib

import tokenizers
import transformers

from tests.models._chat_templates import CONVERSATIONS, TEMPLATES, TOOLS


def main() -> None:
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(tokenizers.models.BPE({"[eos]": 0}, [])),
        eos_token="[eos]",
    )
    goldens: dict[str, list[str | None]] = {}
    for name, template in TEMPLATES.items():
        goldens[name] = []
        for number, conversation in enumerate(CONVERSATIONS):
            for tools in (None, TOOLS):
                try:
                    text = tokenizer.apply_chat_template(
                        conversation,
                        tools=tools,
                        chat_template=template,
                        add_generation_prompt=number % 2 == 0,
                        tokenize=False,
                    )
                except Exception as error:
                    print(f"{name}, conversation {number}: refused ({error})")
                    text = None
                goldens[name].append(text)
    path = pathlib.Path(__file__).parent / "chat_goldens.json"
    path.write_text(json.dumps(goldens, indent=1, ensure_ascii=False) + "\n")
    print(f"{path}: {path.stat().st_size} bytes, transformers {transformers.__version__}")


if __name__ == "__main__":
    main()
