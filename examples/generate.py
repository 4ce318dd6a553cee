"""Continue a prompt with transformers' pipeline.

    python examples/generate.py MODEL PROMPT [--chat] [--max-new-tokens 50]

--chat: PROMPT is the message of a user. The tokenizer needs a chat template.
"""

import argparse

from transformers import pipeline, set_seed


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("prompt")
    parser.add_argument("--chat", action="store_true")
    parser.add_argument("--max-new-tokens", type=int, default=50)
    args = parser.parse_args()

    set_seed(0)
    generate = pipeline("text-generation", model=args.model)
    prompt = [{"role": "user", "content": args.prompt}] if args.chat else args.prompt
    (output,) = generate(prompt, max_new_tokens=args.max_new_tokens, max_length=None, do_sample=True, top_k=50)
    text = output["generated_text"]
    print(text[-1]["content"] if args.chat else text)


if __name__ == "__main__":
    main()
