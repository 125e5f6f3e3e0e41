"""python -m llmjax: the command llmjax."""

from llmjax.commands.train import main

if __name__ == "__main__":
    main()
